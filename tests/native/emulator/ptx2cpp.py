"""Turns nvcc's PTX into C++ for the emulator: every kernel becomes a function of its own mangled name.

    nvcc -O3 -arch=compute_80 -lineinfo -ptx kernels.cu; python ptx2cpp.py kernels.ptx > kernels.ptx.cpp

Linked with the kernels that g++ compiled, these functions replace them (those are weak symbols).  So the
tests run the output of nvcc's optimiser: its loads, barriers, shuffles and inline assembly.
An instruction or modifier that is not listed here is an error: nothing is guessed.
"""

import re
import sys
from pathlib import Path

CXX = {
    **{f"{sign}{bits}": f"{prefix}int{bits}_t" for bits in (8, 16, 32, 64) for sign, prefix in (("s", ""), ("u", "u"))},
    **{f"b{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "f16": "__half",
    "bf16": "__nv_bfloat16",
    "pred": "bool",
}
SPECIAL = {
    f"%{name}.{axis}": f"{cuda}.{axis}"
    for name, cuda in (("tid", "threadIdx"), ("ctaid", "blockIdx"), ("ntid", "blockDim"), ("nctaid", "gridDim"))
    for axis in "xyz"
}
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class UnknownPtxError(Exception):
    """PTX that the translator does not support."""


def size(ptx_type: str) -> int:
    """Returns the bytes of a PTX type."""
    return int(re.sub(r"\D", "", ptx_type)) // 8


def label(name: str) -> str:
    return "L_" + name.strip().lstrip("$")


def split(operands: str) -> list[str]:
    """Splits operands at the commas outside braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", operands)]


def names(vector: str) -> list[str]:
    return [part.strip() for part in vector.strip("{} ").split(",")]


INSTRUCTIONS = []


def instruction(pattern: str):
    """Registers the decorated method for the opcodes that the whole pattern matches."""

    def register(method):
        INSTRUCTIONS.append((re.compile(pattern), method))
        return method

    return register


class Kernel:
    """One .entry: its parameters, its registers and the C++ statements so far."""

    def __init__(self, name: str, parameters: str, shared: dict[str, int], files: dict[str, str]):
        self.name, self.shared, self.files = name, shared, files
        self.registers: dict[str, str] = {}
        self.statements: list[str] = []
        self.place = ("ptx", 0)
        self.parameters = []
        for text in filter(None, (part.strip() for part in parameters.split(","))):
            match = re.fullmatch(r"\.param(?: \.align \d+)? \.(\w+) ([\w$]+)(?:\[(\d+)\])?", text)
            if not match:
                raise UnknownPtxError(f"parameter {text}")
            kind, parameter, count = match.groups()
            self.parameters.append((parameter, f"ptx::Bytes<{count}>" if count else CXX[kind]))

    # Operands

    def register(self, name: str) -> str:
        if name not in self.registers:
            raise UnknownPtxError(f"register {name}")
        return "r_" + re.sub(r"\W", "_", name.lstrip("%"))

    def value(self, operand: str, kind: str) -> str:
        """Returns the operand as a C++ expression of a PTX type."""
        cxx = CXX[kind]
        if operand in SPECIAL:
            return f"{cxx}({SPECIAL[operand]})"
        if operand in self.registers:
            return self.register(operand) if kind == "pred" else f"ptx::as<{cxx}>({self.register(operand)})"
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return f"std::bit_cast<float>(0x{match[1]}u)"
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            return f"std::bit_cast<double>(uint64_t(0x{match[1]}))"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand) and kind[0] in "usb":
            return f"{cxx}({operand}ll)"
        if kind == "pred" and operand in ("0", "1", "-1"):
            return "false" if operand == "0" else "true"
        if operand in self.shared:
            return f"{cxx}({self.shared[operand]}u)"
        if any(operand == parameter for parameter, _ in self.parameters) and size(kind) == 8:
            return f"{cxx}(reinterpret_cast<uintptr_t>(&p_{operand}))"
        raise UnknownPtxError(f"operand {operand}")

    def put(self, target: str, kind: str, expression: str) -> None:
        if kind == "pred":
            self.statements.append(f"{self.register(target)} = {expression};")
        else:
            self.statements.append(f"ptx::set({self.register(target)}, {CXX[kind]}({expression}));")

    def pointer(self, address: str, space: str) -> str:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", address)
        if not match:
            raise UnknownPtxError(f"address {address}")
        base, offset = match[1], match[2] or "0"
        if space == "shared":
            start = f"{self.shared[base]}u" if base in self.shared else self.register(base)
            return f"ptx::shared_memory(shared_variables, uint32_t({start} + {offset}))"
        return f"reinterpret_cast<char*>({self.value(base, 'u64')} + int64_t({offset}))"

    def site(self) -> str:
        return f'"{self.place[0]}", {self.place[1]}'

    # Instructions: `kind` is the last word of the opcode, `word` all of its words

    @instruction(r"mov\.(pred|[usbf](16|32|64))")
    def mov(self, word, kind, a):
        packing, unpacking = a[1].startswith("{"), a[0].startswith("{")
        if not packing and not unpacking:
            return self.put(a[0], kind, self.value(a[1], kind))
        parts = names(a[1] if packing else a[0])
        bits = size(kind) * 8 // len(parts)
        part = f"u{bits}"
        if packing:
            terms = (f"{CXX[kind]}({self.value(p, part)}) << {i * bits}" for i, p in enumerate(parts))
            return self.put(a[0], kind, " | ".join(terms))
        for i, p in enumerate(parts):
            if p != "_":
                self.put(p, part, f"{self.value(a[1], kind)} >> {i * bits}")
        return None

    @instruction(r"(add|sub)\.([us]32|[us]64|f32|f64|rn\.f32|rn\.f64)|mul\.(lo\.[us](32|64)|f32|f64|rn\.f32|rn\.f64)")
    @instruction(r"div\.rn\.(f32|f64)|(and|or|xor)\.(pred|b32|b64)")
    def binary(self, word, kind, a):
        if kind[0] == "s":
            kind = "u" + kind[1:]  # wraps, and has the same bits
        self.put(a[0], kind, f"{self.value(a[1], kind)} {OPERATORS[word[0]]} {self.value(a[2], kind)}")

    @instruction(r"(div|rem)\.[us](32|64)")
    def divide(self, word, kind, a):
        sign = "/" if word[0] == "div" else "%"
        self.put(a[0], kind, f"{self.value(a[1], kind)} {sign} {self.value(a[2], kind)}")

    @instruction(r"mul\.wide\.[us]32")
    def mul_wide(self, word, kind, a):
        wide = kind[0] + "64"
        self.put(a[0], wide, f"{CXX[wide]}({self.value(a[1], kind)}) * {self.value(a[2], kind)}")

    @instruction(r"mad\.lo\.[us](32|64)")
    def mad(self, word, kind, a):
        kind = "u" + kind[1:]
        x, y, z = (self.value(operand, kind) for operand in a[1:])
        self.put(a[0], kind, f"{x} * {y} + {z}")

    @instruction(r"fma\.(rn|rm)\.f32|fma\.rn\.f64")
    def fma(self, word, kind, a):
        x, y, z = (self.value(operand, kind) for operand in a[1:])
        self.put(a[0], kind, f"{'ptx::fma_down' if word[1] == 'rm' else 'std::fma'}({x}, {y}, {z})")

    @instruction(r"add\.rz\.f32")
    def add_to_zero(self, word, kind, a):
        self.put(a[0], kind, f"ptx::add_to_zero({self.value(a[1], kind)}, {self.value(a[2], kind)})")

    @instruction(r"(min|max)\.([us](32|64)|f32|f64)")
    def extremum(self, word, kind, a):
        self.put(a[0], kind, f"ptx::{word[0]}({self.value(a[1], kind)}, {self.value(a[2], kind)})")

    @instruction(r"not\.(pred|b32|b64)|neg\.(s32|s64|f32|f64)")
    def unary(self, word, kind, a):
        if kind[0] == "s":
            kind = "u" + kind[1:]
        sign = "-" if word[0] == "neg" else "!" if kind == "pred" else "~"
        self.put(a[0], kind, sign + self.value(a[1], kind))

    @instruction(r"shl\.b(32|64)")
    def shl(self, word, kind, a):
        self.put(a[0], kind, f"ptx::shift_left({self.value(a[1], kind)}, {self.value(a[2], 'u32')})")

    @instruction(r"shr\.[us](32|64)")
    def shr(self, word, kind, a):
        self.put(a[0], kind, f"ptx::shift_right({self.value(a[1], kind)}, {self.value(a[2], 'u32')})")

    @instruction(r"setp\.(eq|ne|lt|le|gt|ge)u?\.(f32|f64)|setp\.(eq|ne|lt|le|gt|ge)\.[usb](16|32|64)")
    @instruction(r"setp\.(nan|num)\.(f32|f64)")
    def setp(self, word, kind, a):
        x, y = self.value(a[1], kind), self.value(a[2], kind)
        unordered = f"ptx::unordered({x}, {y})"
        if word[1] in ("nan", "num"):
            return self.put(a[0], "pred", ("" if word[1] == "nan" else "!") + unordered)
        relation = f"{x} {COMPARE[word[1][:2]]} {y}"
        if kind[0] == "f" and len(word[1]) == 3:
            relation = f"{unordered} || {relation}"
        elif kind[0] == "f" and word[1] == "ne":
            relation = f"!{unordered} && {relation}"
        return self.put(a[0], "pred", relation)

    @instruction(r"selp\.[usbf](16|32|64)")
    def selp(self, word, kind, a):
        yes, no = self.value(a[1], kind), self.value(a[2], kind)
        self.put(a[0], kind, f"{self.value(a[3], 'pred')} ? {yes} : {no}")

    @instruction(r"(abs|sqrt\.rn|rcp\.rn)\.(f32|f64)|ex2\.approx(\.ftz)?\.f32|rcp\.approx\.ftz\.f64")
    def function(self, word, kind, a):
        x = self.value(a[1], kind)
        if word[0] == "ex2":
            expression = f"ptx::flushed(std::exp2(ptx::flushed({x})))" if "ftz" in word else f"std::exp2({x})"
        elif word[:2] == ["rcp", "approx"]:
            expression = f"ptx::reciprocal_start({x})"
        else:
            expression = {"abs": "std::fabs(", "sqrt": "std::sqrt(", "rcp": "(1 / "}[word[0]] + x + ")"
        self.put(a[0], kind, expression)

    @instruction(r"cvt\.[us](8|16|32|64)\.[us](8|16|32|64)|cvt\.rn\.(f32|f64)\.[us](32|64)")
    @instruction(r"cvt\.rn\.f32\.f64|cvt\.f64\.f32|cvt\.f32\.(f16|bf16)|cvt\.rn\.(f16|bf16)\.f32")
    def cvt(self, word, kind, a):
        self.put(a[0], word[-2], f"{CXX[word[-2]]}({self.value(a[1], kind)})")

    @instruction(r"cvt\.rni\.([us](32|64)\.(f32|f64)|f32\.f32)")
    def cvt_nearest(self, word, kind, a):
        self.put(a[0], word[-2], f"{CXX[word[-2]]}(std::nearbyint({self.value(a[1], kind)}))")

    @instruction(r"cvt\.sat\.f32\.f32")
    def cvt_saturate(self, word, kind, a):
        self.put(a[0], kind, f"ptx::saturated({self.value(a[1], kind)})")

    @instruction(r"cvta\.to\.global\.u64")
    def cvta(self, word, kind, a):
        self.put(a[0], kind, self.value(a[1], kind))

    @instruction(r"cvta\.to\.shared\.u64")
    def cvta_to_shared(self, word, kind, a):
        pointer = self.value(a[1], kind)
        self.put(a[0], kind, f"ptx::shared_address(shared_variables, std::size(shared_variables), {pointer})")

    @instruction(r"cvta\.shared\.u64")
    def cvta_shared(self, word, kind, a):
        pointer = f"ptx::shared_memory(shared_variables, {self.value(a[1], kind)})"
        self.put(a[0], kind, f"reinterpret_cast<uintptr_t>({pointer})")

    @instruction(r"(ld\.(param|global|shared)|st\.(global|shared))(\.v[24])?\.[usbf](8|16|32|64)")
    def move(self, word, kind, a):
        loads = word[0] == "ld"
        address, registers = (a[1], names(a[0])) if loads else (a[0], names(a[1]))
        vector = f"ptx::Lanes<{CXX[kind]}, {len(registers)}>"
        place = f"ptx::aligned<{vector}>({self.pointer(address, word[1])}, {self.site()})"
        if not loads:
            if size(kind) == 1:
                raise UnknownPtxError("a store of bytes")
            values = ", ".join(self.value(r, kind) for r in registers)
            self.statements.append(f"*{place} = {vector}{{{{{values}}}}};")
            return
        loaded = [(i, r) for i, r in enumerate(registers) if r != "_"]
        sets = " ".join(f"ptx::set({self.register(r)}, v.v[{i}]);" for i, r in loaded)
        self.statements.append(f"{{ const {vector} v = *{place}; {sets} }}")

    @instruction(r"(atom|red)\.(global|shared)\.add\.u(32|64)")
    def atomic_add(self, word, kind, a):
        address, added = a[-2:]
        place = f"ptx::aligned<{CXX[kind]}>({self.pointer(address, word[1])}, {self.site()})"
        call = f"atomicAdd({place}, {self.value(added, kind)})"
        self.put(a[0], kind, call) if word[0] == "atom" else self.statements.append(f"{call};")

    @instruction(r"bra(\.uni)?")
    def bra(self, word, kind, a):
        self.statements.append(f"goto {label(a[0])};")

    @instruction(r"ret")
    def ret(self, word, kind, a):
        self.statements.append("return;")

    @instruction(r"bar\.sync")
    def barrier(self, word, kind, a):
        if a != ["0"]:
            raise UnknownPtxError("a named barrier")
        self.statements.append(f"__syncthreads({self.site()});")

    @instruction(r"bar\.warp\.sync")
    def warp_barrier(self, word, kind, a):
        self.statements.append(f"__syncwarp({self.value(a[0], 'u32')}, {self.site()});")

    @instruction(r"shfl\.sync\.bfly\.b32")
    def shuffle(self, word, kind, a):
        target = a[0].split("|")[0]  # the predicate output is ignored
        width = f"int(32 - (({self.value(a[3], 'u32')} >> 8) & 31))"
        source = f"int({self.value(a[2], 'u32')})"
        mask, value = self.value(a[4], "u32"), self.value(a[1], "b32")
        self.put(target, "b32", f"__shfl_xor_sync({mask}, {value}, {source}, {width}, {self.site()})")

    # Tensor cores and asynchronous copies

    @instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x[24](\.trans)?\.shared\.b16")
    def ldmatrix(self, word, kind, a):
        registers, transposed = names(a[0]), str("trans" in word).lower()
        if len(registers) != int(word[4][1]):
            raise UnknownPtxError("ldmatrix with another number of registers")
        call = f"emulator::ldmatrix<{len(registers)}, {transposed}>(m, {self.pointer(a[1], 'shared')}, {self.site()})"
        sets = " ".join(f"ptx::set({self.register(r)}, m[{i}]);" for i, r in enumerate(registers))
        self.statements.append(f"{{ uint32_t m[{len(registers)}]; {call}; {sets} }}")

    @instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32")
    def mma(self, word, kind, a):
        out, x, y, z = map(names, a)
        operands = ((x, "b32", 4), (y, "b32", 2), (z, "f32", 4))
        if len(out) != 4 or any(len(registers) != count for registers, _, count in operands):
            raise UnknownPtxError("mma with another number of registers")
        x, y, z = (", ".join(self.value(r, kind) for r in registers) for registers, kind, _ in operands)
        sets = " ".join(f"ptx::set({self.register(r)}, z[{i}]);" for i, r in enumerate(out))
        call = f"emulator::mma<{CXX[word[7]]}>(z, x, y, {self.site()})"
        arrays = f"float z[] = {{{z}}}; const uint32_t x[] = {{{x}}}, y[] = {{{y}}};"
        self.statements.append(f"{{ {arrays} {call}; {sets} }}")

    @instruction(r"cp\.async\.cg\.shared\.global")
    def copy_async(self, word, kind, a):
        if len(a) != 4 or a[2] != "16":
            raise UnknownPtxError("an asynchronous copy in another form")
        to, source = self.pointer(a[0], "shared"), self.pointer(a[1], "global")
        self.statements.append(f"emulator::copy_async({to}, {source}, {self.value(a[3], 's32')}, {self.site()});")

    @instruction(r"cp\.async\.commit_group")
    def commit_copies(self, word, kind, a):
        self.statements.append("emulator::commit_copies();")

    @instruction(r"cp\.async\.wait_group")
    def wait_for_copies(self, word, kind, a):
        self.statements.append(f"emulator::wait_for_copies({int(a[0])});")

    # The body

    def locate(self, line: str) -> None:
        """Reads a .loc directive.  Code inlined from CUDA's headers is attributed to its caller."""
        file, number = re.match(r"\.loc\s+(\d+)\s+(\d+)", line).groups()
        inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", line)
        if inlined and "/cuda-" in self.files.get(file, ""):
            file, number = inlined.groups()
        if int(number):
            self.place = (self.files.get(file, "ptx"), int(number))

    def declare(self, statement: str) -> None:
        kind, registers = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
        for register in names(registers):
            if match := re.fullmatch(r"(%\w+)<(\d+)>", register):
                self.registers |= {f"{match[1]}{i}": kind for i in range(int(match[2]))}
            else:
                self.registers[register] = kind

    def statement(self, text: str) -> None:
        """Translates one instruction with its predicate."""
        if text.startswith(".reg"):
            return self.declare(text)
        guard = re.match(r"@(!?)(%\w+)\s+", text)
        if guard:
            text = text[guard.end() :]
        opcode, _, operands = re.sub(r"\s+", " ", text).partition(" ")
        method = next((method for pattern, method in INSTRUCTIONS if pattern.fullmatch(opcode)), None)
        if method is None:
            raise UnknownPtxError(f"instruction {text}")
        before = len(self.statements)
        word = opcode.split(".")
        method(self, word, word[-1], split(operands))
        code = " ".join(self.statements[before:])
        del self.statements[before:]
        self.statements.append(f'#line {self.place[1] or 1} "{self.place[0]}"')
        self.statements.append(f"if ({guard[1]}{self.register(guard[2])}) {{ {code} }}" if guard else code)
        return None

    def body(self, text: str) -> None:
        for token in re.findall(
            r"\.loc[^\n]*|\.pragma[^\n]*|[$\w]+:|\{|\}|[^;{}\n]*(?:\{[^{}\n]*\}[^;{}\n]*)*;|\S", text
        ):
            stripped = token.strip()
            if stripped.startswith(".loc"):
                self.locate(stripped)
            elif stripped.startswith(".pragma") or stripped in ("", "{", "}", ";"):
                continue
            elif stripped.endswith(":"):
                self.statements.append(f"{label(stripped[:-1])}:;")
            elif stripped.endswith(";"):
                self.statement(stripped[:-1].strip())
            else:
                raise UnknownPtxError(stripped)

    def cxx(self) -> str:
        used = set(re.findall(r"\br_\w+", " ".join(self.statements)))
        declarations: dict[str, list[str]] = {}
        for register, kind in self.registers.items():
            if self.register(register) in used:
                bits = "bool" if kind == "pred" else f"uint{size(kind) * 8}_t"
                declarations.setdefault(bits, []).append(self.register(register) + "{}")
        parameters = ", ".join(f"{kind} p_{name}" for name, kind in self.parameters)
        lines = [f'void {self.name}_({parameters}) asm("{self.name}");', f"void {self.name}_({parameters}) {{"]
        lines += [f"{kind} {', '.join(registers)};" for kind, registers in declarations.items()]
        lines += ["{ const emulator::Untracked books; if (!threadIdx.x && !blockIdx.x) ++emulator::g_ptx_launches; }"]
        return "\n".join([*lines, *self.statements, "}"])


def translate(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    text = re.sub(r"//[^\n]*", "", text)
    # a single variable, an array, or the dynamic one: an array without a size
    shared_pattern = r"(?:\.extern\s+|\.visible\s+)?\.shared\s+\.align\s+\d+\s+\.([usbf]\d+)\s+([\w$]+)(\[\d*\])?;"
    found = re.findall(shared_pattern, text)
    shared = {name: i << 20 for i, (_, name, _) in enumerate(found)}
    sizes = [size(kind) * int(array.strip("[]") or 0) if array else size(kind) for kind, _, array in found]
    variables = ", ".join(f"{{{count}, 0}}" for count in sizes) or "{0, 0}"
    text = re.sub(shared_pattern, "", text)
    out = ["#include <ptx_runtime.h>", f"static ptx::SharedVariable shared_variables[] = {{{variables}}};"]
    header = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.(?:maxntid|minnctapersm)[^\n{]*\n)*)\s*\{", re.S)
    for match in header.finditer(text):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        kernel = Kernel(match[1], match[2], shared, files)
        kernel.body(text[match.end() : end - 1])
        out.append(kernel.cxx())
    if len(out) - 2 != len(re.findall(r"\.entry\b", text)) or re.search(r"\.func\b", text):
        raise UnknownPtxError("a kernel or function whose head was not understood")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    sys.stdout.write(translate(Path(sys.argv[1]).read_text()))
