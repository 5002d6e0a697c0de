"""The arguments of the command line.  It imports neither torch nor NumPy, so help and errors appear at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["PRESET_NAMES", "VERBS", "parse"]

_FEATURES = ".npz, .safetensors or .parquet file, or folder of .npy or .parquet files"
PRESET_NAMES = ("omniglot", "cl2r", "iamcl2r-7", "iamcl2r-31", "cpu-small", "paper-half")  # keys of training.PRESETS


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments of one verb; the result's `verb` is its name.

    Raises:
        SystemExit: 0 after --help and --version, 2 if the arguments are wrong.
    """
    parser = argparse.ArgumentParser(
        prog="simplexfix", description="Compatible representations: swap your embedding model, keep your index."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (summary, add_arguments) in VERBS.items():
        add_arguments(verbs.add_parser(name, help=summary, description=summary))
    arguments, rest = parser.parse_known_args(argv)
    if getattr(arguments, "agreement", None) is not None:
        if arguments.protocol is not None or arguments.qrels is not None:
            parser.error("--agreement is a protocol of its own: leave out --protocol and --qrels")
        arguments.protocol = f"agreement@{arguments.agreement}"
    if "qrels" in arguments and arguments.protocol is None:
        arguments.protocol = "nearest_class_mean" if arguments.qrels is None else "ndcg@10"
    # argparse ends a list of positional arguments at the first option; later ones belong to the list as well
    if hasattr(arguments, "changes") and not any(text.startswith("-") for text in rest):
        arguments.changes += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


class _Version(argparse.Action):
    """Prints the version; the package is imported only for this option."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .. import __version__

        print(f"simplexfix {__version__}")
        parser.exit()


def _adapt(parser: argparse.ArgumentParser) -> None:
    rows = ".npy file of [N, d] features"
    parser.add_argument(
        "--old", type=Path, required=True, help=f"features by the encoder in service: {rows}, or a version: {_FEATURES}"
    )
    parser.add_argument(
        "--new", type=Path, required=True, help="features of the same items in the same order by the new encoder"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        help="classes of the items: .npy file of [N] integers or names, or text file with a line per item",
    )
    parser.add_argument(
        "--sample",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="features of further gallery items without labels, by both encoders",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument(
        "--old-model",
        type=Path,
        metavar="MODEL",
        help="folder or .json identity of the encoder in service: its gallery then admits the adapter",
    )
    parser.add_argument("--new-model", type=Path, metavar="MODEL", help="folder or .json identity of the new encoder")
    parser.add_argument(
        "--version",
        dest="number",
        type=int,
        metavar="N",
        help="number of the adapted encoder (default: one above that of --old-model, or 0)",
    )
    parser.add_argument("--name", default="", help="name of the adapted encoder")
    parser.add_argument(
        "--query-encoders",
        choices=("new", "both"),
        default="new",
        help="which encoders run at query time (default: new)",
    )
    parser.add_argument(
        "--stored-vectors",
        choices=("map", "keep"),
        default="map",
        help="keep: leave out methods that also map the stored vectors (default: map)",
    )
    parser.add_argument("--protocol", choices=("nearest_class_mean", "instance"), default="nearest_class_mean")
    parser.add_argument(
        "--seen-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="fraction of the service's queries that concern the labelled classes (default: 0.0)",
    )
    parser.add_argument("--folds", type=int, default=1, help="number of thirds held out in turn, 1 to 3 (default: 1)")
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="confidence of intervals (default: 0.95)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the split and the bootstrap (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL_OR_ADAPTER", help="folder that save_pretrained has written")
    parser.add_argument(
        "input",
        type=Path,
        metavar="IN",
        help=".npy file of inputs, a row for each item; or .npz, .safetensors or .parquet file or folder of .npy files "
        "with vectors [N, d] and, optionally, ids [N]; or a folder of images, or an image",
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help=".npy file for [N, d] unit float32 rows; or .npz file for the same rows as vectors, with the ids of IN or "
        "the paths of its images",
    )
    parser.add_argument(
        "--gallery",
        action="store_true",
        help="IN holds vectors that the adapter's old encoder has stored, not queries by the new one",
    )
    parser.add_argument(
        "--old", type=Path, metavar="FILE", help="features of the same queries by the old encoder, for slerp"
    )


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for report and pictures (default: demo)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of data order, weights and batches (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.add_argument("--quick", action="store_true", help="train only a little, in less than 30 s")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "versions",
        type=Path,
        nargs="+",
        metavar="VERSION",
        help=f"{_FEATURES}, oldest first; or one folder that holds them, sorted by name, v2 before v10",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
    _add_comparison(parser)
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="confidence of intervals (default: 0.95)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FILE",
        help="text file with the path of each query's image, one per line, to show the worst regressions",
    )
    parser.add_argument(
        "--gallery-images", type=Path, metavar="FILE", help="text file with the path of each gallery item's image"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, that of report.json")


def _gallery(parser: argparse.ArgumentParser) -> None:
    model = "folder of a model, or .json file of an identity, as ModelIdentity.to_dict() gives it"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=summary, description=summary)
        added.add_argument(
            "url",
            metavar="URL",
            help="folder of the gallery, FILE.db#NAME or http://HOST:PORT#NAME (Milvus), or "
            "postgresql://USER@HOST:PORT/DATABASE#NAME",
        )
        added.add_argument("--json", action="store_true", help="print one JSON object")
        return added

    create = action("create", "Makes an empty gallery, which a model serves.")
    create.add_argument("--model", type=Path, required=True, help=model)
    create.add_argument("--threshold", type=float, metavar="T", help="lowest score of a match (default: none)")
    create.add_argument("--count-traffic", action="store_true", help="count searches, for backfill --order traffic")
    add = action("add", "Adds vectors, or images.")
    add.add_argument(
        "--payload",
        type=Path,
        metavar="FILE",
        help=".json list of objects, or .csv table, with a row for each vector in order; for images a row has the path "
        "in the folder, and may have the id",
    )
    search = action("search", "Searches rows of all versions as one ranking.")
    search.add_argument("-k", type=int, default=10, help="hits for each query (default: 10)")
    search.add_argument("--where", metavar="JSON", help='payload keys and their values, as {"shop": [1, 2]}')
    search.add_argument("--out", type=Path, metavar="FILE", help=".npz file for ids, scores, versions and thresholds")
    status = action("status", "Prints which model serves, and how many rows each version has.")
    status.add_argument(
        "--history", action="store_true", help="also print every admission, backfill, rollback and retirement"
    )
    admit = action("admit", "Admits a compatible model, which serves from now on.")
    admit.add_argument("--model", type=Path, required=True, help=model)
    admit.add_argument("--gate", type=Path, metavar="FILE", help="result of `simplexfix gate --old-model --new-model`")
    admit.add_argument("--force", metavar="REASON", help="admit it without a passed gate; the history keeps the reason")
    admit.add_argument(
        "--threshold",
        type=_threshold,
        action="append",
        default=[],
        metavar="QUERIES:VECTORS=T",
        help="lowest score of a match between queries of one version and vectors of another, as 1:0=0.35 or 0:1=none; "
        "may be repeated",
    )
    backfill = action("backfill", "Replaces old vectors by those of the model that serves; any number may run at once.")
    backfill.add_argument(
        "--order", choices=("random", "traffic"), default="random", help="which rows come first (default: random)"
    )
    for part, ids, also in ((add, " and ids [n]", ""), (search, "", "; or an image"), (backfill, " and ids [n]", "")):
        made = part.add_mutually_exclusive_group(required=True)
        made.add_argument(
            "--vectors",
            type=Path,
            metavar="FILE",
            help=f"vectors [n, d] by the model{ids}: .npz, .safetensors or .parquet file, or folder of .npy files",
        )
        made.add_argument(
            "--inputs",
            type=Path,
            metavar="PATH",
            help=f"inputs that the model embeds: a folder of images{also}; or features, in a file as for --vectors",
        )
        part.add_argument("--model", type=Path, required=True, help=f"model of the vectors: {model}")
    for part, rows in ((add, "images"), (backfill, "rows")):
        part.add_argument("--batch", type=_positive, default=256, metavar="N", help=f"{rows} at a time (default: 256)")
    action("rollback", "Makes the previous model serve again, with its vectors.")
    retire = action("retire", "Deletes the replaced vectors of a version for good.")
    retire.add_argument("version", type=int, metavar="VERSION", help="number of the version")
    action("pause", "Ends every backfill after its batch.")
    action("resume", "Lets backfills run again.")


def _positive(text: str) -> int:
    try:
        if int(text) >= 1:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")


def _threshold(text: str) -> tuple[tuple[int, int], float | None]:
    try:
        pair, _, value = text.partition("=")
        query, _, vectors = pair.partition(":")
        return (int(query), int(vectors)), None if value == "none" else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be QUERIES:VECTORS=T, as 1:0=0.35 or 0:1=none, got {text}") from None


def _gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--old", type=Path, required=True, help=f"features by the model in service: {_FEATURES}")
    parser.add_argument("--new", type=Path, required=True, help="features by the model that is to replace it")
    parser.add_argument(
        "--old-model",
        type=Path,
        metavar="MODEL",
        help="folder or .json identity of the model in service; `gallery admit` needs this and --new-model",
    )
    parser.add_argument(
        "--new-model", type=Path, metavar="MODEL", help="folder or .json identity of the model that is to replace it"
    )
    parser.add_argument(
        "--agreement",
        type=_positive,
        nargs="?",
        const=10,
        metavar="K",
        help="judge without labels, by the fraction of the K (10) nearest items in the new gallery that a query also "
        "finds in the old one; OLD and NEW may be .npy files with [N, d] features of the same items",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="adapter of `simplexfix adapt`, which maps the new queries as in service",
    )
    parser.add_argument(
        "--unconstrained", type=Path, help="features by a model trained without compatibility, for --max-tax"
    )
    parser.add_argument(
        "--rules",
        type=Path,
        help='.json or .toml: {"rules": [{"kind": "ecc" | "max_nfr" | "max_tax" | "min_recall", "limit": ..., '
        '"confidence": ..., "gallery": "old" | "new", "group": ...}, ...]}',
    )
    parser.add_argument(
        "--ecc", action="store_true", help="apply the default rule too, if other flags or --rules give rules"
    )
    parser.add_argument(
        "--max-nfr", type=float, metavar="FRACTION", help="largest fraction of queries that may become wrong"
    )
    parser.add_argument(
        "--max-tax",
        type=float,
        metavar="FRACTION",
        help="largest score that compatibility may cost, against --unconstrained",
    )
    parser.add_argument(
        "--min-recall",
        type=float,
        metavar="FRACTION",
        help="lowest score that the new queries may have on the old gallery",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="C",
        help="confidence of rules from flags (default: 0.95 for ECC, none for others)",
    )
    _add_comparison(parser)
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder that holds runs of `simplexfix train`")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help=f"a .yaml or .json file, or one of: {', '.join(PRESET_NAMES)}")
    parser.add_argument(
        "changes", nargs="*", metavar="KEY.SUB=VALUE", help="values that replace those of the configuration"
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration as JSON, train nothing"
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help="nearest_class_mean (default) or instance; or a metric of the ranking: ndcg@K (default with --qrels: "
        "ndcg@10), map, map@K, mrr, mrr@K, recall@K, precision@K",
    )
    parser.add_argument(
        "--qrels",
        type=Path,
        metavar="FILE",
        help="relevance judgements of BEIR or TREC in place of labels, by query_ids and gallery_ids",
    )
    parser.add_argument(
        "--truncate",
        dest="widths",
        action="store_const",
        const="leading",
        default="equal",
        help="compare versions of different width on the leading dimensions that all have",
    )
    parser.add_argument(
        "--ignored-label",
        dest="ignored_labels",
        action="append",
        default=[],
        metavar="LABEL",
        help="label whose items and queries are left out, such as that of junk images; may be repeated",
    )


def _seed(text: str) -> int:
    try:
        if 0 <= int(text) < 2**31:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be an integer in [0, 2^31), got {text}")


# name -> (summary, function that adds arguments to a parser); simplexfix/cli/NAME.py has run(arguments) -> exit code
VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "adapt": (
        "Fits an adapter from a new encoder to an old one's gallery: exit code 1 if none is better.",
        _adapt,
    ),
    "demo": ("Trains four versions on handwriting, replaces the model and searches the old galleries.", _demo),
    "doctor": ("Prints what is installed, which kernels run on this machine, and why others do not.", _doctor),
    "embed": ("Applies a model to features or images, or an adapter to features.", _embed),
    "evaluate": ("Judges model versions by their features and labels alone, and writes a report.", _evaluate),
    "gallery": ("Keeps a gallery through upgrades of its model: create, search, admit, backfill, roll back.", _gallery),
    "gate": ("Judges an upgrade by rules: exit code 0 if it passes, 1 if a rule fails, 2 on bad input.", _gate),
    "runs": ("Lists the runs in a folder: their progress, their scores, and how their configurations differ.", _runs),
    "train": ("Trains the versions of a configuration, or resumes them, and judges them.", _train),
}
