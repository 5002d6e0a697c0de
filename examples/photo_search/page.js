"use strict";

const at = (id) => document.getElementById(id);
const canvas = at("canvas"), pen = canvas.getContext("2d");
let query = null; // the image of the last search, which is repeated while vectors are replaced
let searches = 0; // number of the last search; responses to earlier ones are dropped
let polling = null;

async function call(path, body) {
  const answer = await fetch(path, path === "/status" ? {} : { method: "POST", body });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function tell(error) {
  at("error").textContent = error ? error.message : "";
  at("error").hidden = !error;
}

// drawing

function clearCanvas() {
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

function paint(image) {
  const side = Math.min(image.width, image.height); // crops at the centre, as the search does
  const [left, top] = [(image.width - side) / 2, (image.height - side) / 2];
  clearCanvas();
  pen.drawImage(image, left, top, side, side, 0, 0, canvas.width, canvas.height);
}

let stroke = null;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  stroke = place(event);
  drawTo(event);
});
canvas.addEventListener("pointermove", (event) => { if (stroke) drawTo(event); });
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (!stroke) return;
    stroke = null;
    canvas.toBlob((image) => search(image, "Searching by your drawing."));
  });
}

function drawTo(event) {
  const to = place(event);
  Object.assign(pen, { strokeStyle: "#000000", lineWidth: 14, lineCap: "round", lineJoin: "round" });
  pen.beginPath();
  pen.moveTo(...stroke);
  pen.lineTo(...to);
  pen.stroke();
  stroke = to;
}

at("clear").addEventListener("click", () => {
  clearCanvas();
  query = null;
  searches += 1;
  at("hits").replaceChildren();
  at("legend").textContent = "None yet: draw something.";
  tell(null);
});

at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  at("file").value = ""; // otherwise opening the same file again would fire no event
  if (!file) return;
  createImageBitmap(file).then(paint, () => {}); // if it is not an image, the search reports the error
  search(file, `Searching by ${file.name}.`);
});

// searching

async function search(image, words) {
  const mine = (searches += 1);
  try {
    const found = await call("/search", image);
    if (mine !== searches) return;
    query = image;
    if (words) at("query").textContent = words;
    tell(null);
    show(found);
  } catch (error) {
    if (mine === searches) tell(error);
  }
}

function show({ version, hits }) {
  at("hits").replaceChildren(...hits.map((hit) => {
    const item = document.createElement("li"), image = document.createElement("img");
    image.src = `/drawings/${hit.id}.png`;
    image.alt = "";
    const name = document.createElement("span"), badge = document.createElement("span");
    name.className = "name";
    name.textContent = hit.character.replace("/character", " ").replaceAll("_", " ");
    badge.className = hit.version ? "badge new" : "badge";
    badge.textContent = `v${hit.version}`;
    if (!hit.accepted) item.className = "below";
    item.title = hit.accepted ? "a match" : "below the threshold of its version";
    item.append(image, name, badge, ` ${hit.score.toFixed(2)}`);
    return item;
  }));
  at("legend").textContent =
    `Searched by v${version}. The badge is the version of the stored vector; pale drawings are below its threshold.`;
}

// the model

async function refresh() {
  clearTimeout(polling);
  let wait = 3000;
  try {
    const status = await call("/status");
    showStatus(status);
    if (status.running) {
      wait = 400;
      if (query) await search(query);
    }
  } catch {
    at("serving").textContent = "The service does not answer.";
  }
  polling = setTimeout(refresh, wait);
}

function showStatus(status) {
  const [old, fresh] = status.versions, upgraded = status.serving === fresh.version;
  at("serving").textContent = status.versions.find((entry) => entry.version === status.serving).name;
  at("since").textContent = `serves since ${new Date(status.since).toLocaleString()}`;
  at("progress").value = fresh.rows / status.rows;
  at("rows").textContent = `${old.rows} vectors are by v0, ${fresh.rows} by v1`
    + (status.running ? "; more are being replaced" : upgraded && status.stale ? "; the backfill is paused" : "");
  at("upgrade").textContent = status.running ? "Upgrading…" : upgraded && status.stale ? "Continue" : "Upgrade";
  at("upgrade").disabled = status.running || (upgraded && !status.stale);
  at("stop").disabled = !status.running;
  at("rollback").disabled = !status.rolls_back;
  at("gate").replaceChildren(...status.gate.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  }));
}

for (const name of ["upgrade", "stop", "rollback"]) {
  at(name).addEventListener("click", async () => {
    at(name).disabled = true;
    try {
      await call(`/${name}`);
      tell(null);
      if (query) await search(query);
    } catch (error) {
      tell(error);
    }
    refresh();
  });
}

clearCanvas();
refresh();
