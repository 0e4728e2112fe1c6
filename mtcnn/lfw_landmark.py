"""Find the five landmarks of the named person in every image of Labeled Faces in the Wild.

    python mtcnn/lfw_landmark.py --lfw DIR

writes a tab-separated line `Name/Name_0001.jpg x1 y1 ... x5 y5` for each image in DIR, in sorted order. Coordinates are
pixels of the whole image, with the image-left eye first. The named person is the face nearest the center of the image.
An image without a face gets the median landmarks of the others; such images are counted and listed. An interrupted run
continues where it stopped.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from faces.files import command, folder, script_parser
from faces.landmarks import default_list, write_landmarks
from mtcnn import landmark_lists as lists


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--lfw", type=Path, required=True, metavar="DIR",
                        help="folder of Name/Name_0001.jpg, or any set with the same layout")
    lists.add_list_options(parser)
    args = parser.parse_args(argv)
    root = folder(args.lfw, "LFW images as Name/Name_0001.jpg")
    paths = lists.list_photos(root, "Name/Name_0001.jpg")
    output = args.output or default_list(root, "lfw_landmark.txt")
    with lists.reserve(output):
        journal, unreadable = lists.find_all(root, paths, output, lists.list_detector(args), args)
        median = lists.median_or_stop(journal.finds(), root)
        write_landmarks(output, ((paths[f.index], f.points or median * np.array(f.size)) for f in journal.finds()))
        lists.report(paths, journal, unreadable, output, "median landmarks")
        journal.remove()


if __name__ == "__main__":
    main()
