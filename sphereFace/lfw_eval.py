"""Evaluate a SphereFace model on LFW with the standard 10-fold protocol.

    python sphereFace/lfw_eval.py --model FILE --net faceNet --lfw DIR
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.verification.evaluate import main
from mtcnn.landmark_lists import find_landmarks
from sphereFace.net import NETS

if __name__ == "__main__":
    sys.exit(main(NETS, "SphereFace", find_landmarks))
