"""Run all benchmarks one after the other, and say at the end which ones ran.

    make benchmarks             those that need no data
    make benchmarks LFW=DIR     all of them: about half an hour on two CPU cores

DIR is the folder of LFW, for which mtcnn/lfw_landmark.py has written the landmarks. Peers that are not installed are
left out; make installs them.
"""
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.files import ROOT, command, path, script_parser

# The slowest come last. LFW stands for the folder.
BENCHMARKS = ("loader.py",
              "throughput.py --batch-size 64 --steps 4 --warm-up 2 --device cpu",
              "training_step.py --turns 8",
              "training_step.py --turns 8 --precision float32",
              "training_step.py --turns 8 --method sphereFace",
              "training_step.py --turns 4 --batch-size 256",
              "training_step.py --turns 4 --batch-size 256 --method sphereFace",
              "mtcnn.py --lfw LFW --collages 24",
              "mtcnn.py --lfw LFW",
              "lfw_eval.py --lfw LFW --pairs 600 --turns 2")


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--lfw", type=path, metavar="DIR", help="LFW (default: skip what needs it)")
    args = parser.parse_args(argv)
    outcomes = {}
    for line in BENCHMARKS:
        if "LFW" in line and args.lfw is None:
            outcomes[line] = "skipped, because it needs LFW=DIR"
            continue
        print(f"\n$ python benchmarks/{line}", flush=True)
        program, *options = (str(args.lfw) if word == "LFW" else word for word in shlex.split(line))
        start = time.monotonic()
        status = subprocess.run([sys.executable, ROOT / "benchmarks" / program, *options]).returncode
        outcomes[line] = f"failed with exit status {status}" if status else f"ran in {time.monotonic() - start:.0f} s"
    print("\n" + "\n".join(f"{line}: {outcome}" for line, outcome in outcomes.items()))
    return int(any("failed" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
