"""Find the five landmarks of the named person in every image of Labeled Faces in the Wild.

    python mtcnn/lfw_landmark.py --lfw DIR

writes a tab-separated line `Name/Name_0001.jpg x1 y1 ... x5 y5` for each image in DIR, in pixels of the whole image.
The named person is the face nearest the center. Images without a face get the median landmarks of the others; they are
listed. An interrupted run continues where it stopped.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.data.sources import Folder
from faces.files import command, existing_folder, path, script_parser
from mtcnn.landmark_lists import list_parser, make_list, median_filled


@command
def main(argv=None):
    parser = list_parser(script_parser(__doc__))
    parser.add_argument("--lfw", type=path, required=True, metavar="DIR",
                        help="folder of Name/Name_0001.jpg, or any set with the same layout")
    args = parser.parse_args(argv)
    source = Folder(existing_folder(args.lfw, "LFW images as Name/Name_0001.jpg"))
    photos = source.names()

    def rows(found, problems):
        return ((photos[i], points) for i, points in enumerate(median_filled(found)) if i not in problems)

    make_list(source, photos, "lfw_landmark.txt", args, rows, "median landmarks")


if __name__ == "__main__":
    main()
