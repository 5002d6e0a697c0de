"""Runs layers of the kernel tests: python tests/native/run.py [--jobs N] plain | asan | tsan | ptx | mutants ..."""

import argparse
import sys
import time

import harness
import mutants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", nargs="+", choices=[*harness.LAYERS, "mutants"])
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    options = parser.parse_args()
    if reason := harness.missing():
        print(f"skipped: {reason}")
        return 1  # whoever asks for a layer by name wants it run
    failed = []
    for layer in options.layers:
        start = time.monotonic()
        if layer == "mutants":
            survivors = mutants.run_all(jobs=options.jobs)
            failed += [f"mutant {name}" for name in survivors]
            continue
        program = harness.build(layer, jobs=options.jobs)
        built = time.monotonic()
        done = harness.run(program, layer)
        print(f"{layer}: {done.stdout.strip()}  [built in {built - start:.0f} s, ran {time.monotonic() - built:.0f} s]")
        if done.returncode:
            failed.append(layer)
    if failed:
        print("FAILED: " + ", ".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
