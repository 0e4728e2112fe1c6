"""Measure a CosFace model on LFW by its ten folds.

    python lfw_eval.py --model FILE --net faceNet --lfw DIR
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cosFace import net
from faces.evaluate import main

if __name__ == "__main__":
    sys.exit(main(net, "CosFace"))
