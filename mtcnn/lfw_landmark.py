"""Find the five landmarks of the named person in every image of Labeled Faces in the Wild.

    python mtcnn/lfw_landmark.py --lfw DIR

writes a tab-separated line `Name/Name_0001.jpg x1 y1 ... x5 y5` for each image in DIR, in sorted order. Coordinates are
pixels of the whole image, with the image-left eye first. The named person is the face nearest the center of the image.
An image without a face gets the median landmarks of the others; such images are counted and listed. An interrupted run
continues where it stopped.
"""
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import numpy as np

from faces.files import InputError, command, folder, script_parser
from faces.images import list_images
from faces.landmarks import default_list, write_landmarks
from mtcnn import landmark_lists as lists


def list_photos(root):
    """Return the sorted paths of all images in a folder that holds one folder of photos per person.

    Raises:
        InputError: there are no images, or most of them are in `root` itself or in folders further down.
    """
    paths = list_images(root)
    wanted = "the folder that holds one folder of photos per person, such as Name/Name_0001.jpg"
    if not paths:
        raise InputError(f"{root} contains no images; pass {wanted}.")
    depths = Counter(path.count("/") for path in paths)
    if 2 * depths[0] > len(paths):
        raise InputError(f"the photos in {root} are not in a person folder; pass {wanted}"
                         + (f", perhaps {root.resolve().parent}." if depths[0] == len(paths) else "."))
    if 2 * (depths[0] + depths[1]) < len(paths):
        above = sorted({path.rsplit("/", 2)[0] for path in paths if path.count("/") > 1})  # the person folders
        if len(above) == 1:
            raise InputError(f"the person folders are not in {root} but further down; pass {root / above[0]}.")
        raise InputError(f"the person folders are not in {root} but in {len(above)} folders below it; pass one of "
                         f"them, such as {root / above[0]}, or move all person folders into one.")
    return paths


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--lfw", type=Path, required=True, metavar="DIR",
                        help="folder of Name/Name_0001.jpg, or any set with the same layout")
    lists.add_list_options(parser)
    args = parser.parse_args(argv)
    detector = lists.list_detector(args)    # checks the options, too
    root = folder(args.lfw, "LFW images as Name/Name_0001.jpg")
    paths = list_photos(root)
    output = args.output or default_list(root, "lfw_landmark.txt")
    with lists.reserved(output):
        journal, unreadable = lists.find_all(root, paths, output, detector, args)
        median = lists.median_or_stop(journal.finds(), root)
        write_landmarks(output, ((paths[f.index], f.points or median * np.array(f.size)) for f in journal.finds()))
        lists.report(paths, journal, unreadable, output, "median landmarks")
        journal.remove()


if __name__ == "__main__":
    main()
