"""Tests the CUDA kernels and the CPU core in the given layers, which README.md in this folder lists:

python tests/native/run.py [--jobs N] plain | asan | tsan | ptx | ptx-tsan | mutants ...
python tests/native/run.py --target aarch64 [--some N] plain      only the core, cross compiled and run by qemu
"""

import argparse
import sys
import time

import harness
import mutants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="+", choices=[*harness.LAYERS, "mutants"])
    parser.add_argument("--jobs", type=int, default=1, help="number of compilers that run at the same time")
    parser.add_argument(
        "--target",
        choices=harness.TARGETS,
        default="native",
        help="machine to build for; only native tests the CUDA kernels",
    )
    parser.add_argument(
        "--some", type=int, metavar="N", help="only N of the emulated CPUs of a target, different ones for each commit"
    )
    options = parser.parse_args()
    target = harness.TARGETS[options.target]
    if options.target != "native" and options.layers != ["plain"]:
        parser.error(f"--target {options.target} supports only the layer plain, got {' '.join(options.layers)}")
    if reason := target.missing():
        print(f"cannot run: {reason}")
        return 1  # a requested layer that cannot run is a failure
    native = options.target == "native"
    levels = list(target.machines)
    if options.some:
        levels = harness.rotating(levels, options.some)
    reason = harness.missing() if native else None
    if reason:
        print(f"the CUDA kernels cannot be tested here: {reason}")
    failed = ["kernels"] if reason else []
    for layer in options.layers:
        if layer == "mutants":
            failed += [f"mutant {name}" for name in mutants.run_all(jobs=options.jobs)]
            continue
        start = time.monotonic()
        if layer in harness.CORE_LAYERS:
            programs = harness.build_core(layer, jobs=options.jobs, target=target)
            built = time.monotonic()
            results = harness.run_core(programs, layer) if native else harness.run_core_on(target, levels, programs[0])
            said = "; ".join(done.stdout.strip() for done in results)
            failed += [f"core {layer}"] * any(done.returncode for done in results)
            print(f"core {layer}: {said}  {_times(start, built)}", flush=True)
        if reason or not native:
            continue
        start = time.monotonic()
        program = harness.build(layer, jobs=options.jobs)
        built = time.monotonic()
        done = harness.run(program, layer)
        print(f"{layer}: {done.stdout.strip()}  {_times(start, built)}", flush=True)
        if done.returncode:
            failed.append(layer)
    if failed:
        print("FAILED: " + ", ".join(failed))
    return bool(failed)


def _times(start: float, built: float) -> str:
    return f"[built in {built - start:.0f} s, ran {time.monotonic() - built:.0f} s]"


if __name__ == "__main__":
    sys.exit(main())
