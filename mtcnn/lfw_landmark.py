"""Find the five landmarks of every image of Labeled Faces in the Wild, for the person it is named for.

    python lfw_landmark.py --lfw DIR

writes a line `Name/Name_0001.jpg x1 y1 ... x5 y5`, tab separated, for each image below DIR, in sorted order; pixels of
the whole image, image-left eye first. That person's face is the one nearest the image's center. An image in which no
face is found gets the median landmarks of the others, is counted and listed. A run that was stopped continues.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from faces.files import InputError, command, folder
from faces.images import list_images
from faces.landmarks import default_list, write_landmarks
from mtcnn.detector import make_detector
from mtcnn.landmark_lists import add_list_options, find_all, median_or_stop, report


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lfw", type=Path, required=True, metavar="DIR",
                        help="folder that holds Name/Name_0001.jpg; any set laid out like it will do")
    add_list_options(parser)
    args = parser.parse_args(argv)
    root = folder(args.lfw, "LFW images as Name/Name_0001.jpg")
    paths = list_images(root)
    if not paths:
        raise InputError(f"{root} holds no images; give the folder that holds Name/Name_0001.jpg.")
    output = args.output or default_list(root, "lfw_landmark.txt")
    journal, unreadable = find_all(root, paths, output, make_detector(args), args)
    median = median_or_stop(journal.finds(), root)
    write_landmarks(output, ((paths[f.index], f.points or median * np.array(f.size)) for f in journal.finds()))
    report(paths, journal, unreadable, output, "median landmarks")
    journal.remove()


if __name__ == "__main__":
    main()
