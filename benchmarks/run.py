"""Run all benchmarks one after the other, and say at the end which ones ran.

    make benchmarks                        those that need no data
    make benchmarks CASIA=DIR LFW=DIR      all of them: about an hour on two CPU cores

DIR are folders of photos: CASIA-WebFace or a set like it, and LFW. Their landmark lists are those that
mtcnn/casia_landmark.py and mtcnn/lfw_landmark.py have written. Peers that are not installed are left out; make installs
them. load.py is not among the programs, because it watches other commands.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
from faces.files import command, script_parser
from tools import commands

CASIA, LFW = ("--casia",), ("--lfw",)
# Program, the sets that it needs, and further options. The slowest come last.
BENCHMARKS = (("margin_softmax", (), ()),
              ("loader", (), ()),
              ("throughput", (), ("--batch-size", "64", "--steps", "8", "--device", "cpu")),
              ("million_identities", (), ("--sample-centers", "0.1")),
              ("training_step", CASIA, ("--steps", "8")),
              ("training_step", CASIA, ("--steps", "8", "--method", "sphereFace")),
              ("training_step", CASIA, ("--steps", "4", "--batch-size", "256")),
              ("aligned_cache", CASIA, ()),
              ("lfw_eval", LFW, ("--pairs", "600")),
              ("mtcnn", LFW, ("--rounds", "2")),
              ("mtcnn", LFW, ("--collages", "24", "--rounds", "2")),
              ("mtcnn_equivariance", LFW, ()))


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--casia", type=Path, metavar="DIR", help="training set (default: skip what needs one)")
    parser.add_argument("--lfw", type=Path, metavar="DIR", help="LFW (default: skip what needs it)")
    args = parser.parse_args(argv)
    sets = {name: path for name, path in (("--casia", args.casia), ("--lfw", args.lfw)) if path is not None}
    lines, failed = [], False
    for name, needed, options in BENCHMARKS:
        missing = [option for option in needed if option not in sets]
        data = [word for option in needed for word in (option, sets.get(option, "DIR"))]
        words = commands.command_line(f"benchmarks/{name}.py", *data, *options)
        if missing:
            outcome = f"skipped, because it needs {missing[0].strip('-').upper()}=DIR"
        else:
            start = time.monotonic()
            status = commands.run(words)
            outcome = f"ran in {time.monotonic() - start:.0f} s" if not status else f"failed with exit status {status}"
            failed |= bool(status)
        lines.append(f"{commands.printed(words)}: {outcome}")
        if not missing and status >= 128:    # a signal
            break
    print("\n" + "\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
