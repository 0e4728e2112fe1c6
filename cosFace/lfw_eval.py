"""Evaluate a CosFace model on LFW with the standard 10-fold protocol.

    python cosFace/lfw_eval.py --model FILE --net faceNet --lfw DIR
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cosFace.net import NETS
from faces.verification.evaluate import main
from mtcnn.landmark_lists import find_landmarks

if __name__ == "__main__":
    sys.exit(main(NETS, "CosFace", find_landmarks))
