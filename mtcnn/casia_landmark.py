"""Find the five landmarks in every image of CASIA-WebFace, or of any folder with one folder of photos per person.

    python mtcnn/casia_landmark.py --casia DIR

writes a tab-separated line `0000045/001.jpg label x1 y1 ... x5 y5` for each image in DIR that has a face, in pixels of
the whole image; the others are listed. An interrupted run continues where it stopped.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from faces.data.casia import LANDMARK_LIST, list_photos, person
from faces.data.sources import Folder
from faces.files import command, count_of, existing_folder, path, script_parser
from mtcnn.landmark_lists import list_parser, make_list
from mtcnn.search import NO_FACE


@command
def main(argv=None):
    parser = list_parser(script_parser(__doc__))
    parser.add_argument("--casia", type=path, required=True, metavar="DIR",
                        help="folder that holds one folder per person, such as 0000045/001.jpg")
    args = parser.parse_args(argv)
    source = Folder(existing_folder(args.casia, "one folder of photos per person, such as 0000045/001.jpg"))
    photos, notes = list_photos(source)    # the same as in training
    print(*notes, sep="\n", end="\n" if notes else "")

    def rows(found, _):
        listed = np.flatnonzero(found["attempt"] > NO_FACE)
        people = sorted({person(photos[i]) for i in listed})
        lost = sorted(set(map(person, photos)) - set(people))
        print(f"{count_of(len(people), 'person')}; people without any image left: {len(lost):,}", *lost[:3])
        label = {name: number for number, name in enumerate(people)}
        return ((photos[i], label[person(photos[i])], found["points"][i]) for i in listed)

    make_list(source, photos, LANDMARK_LIST, args, rows, "left out")


if __name__ == "__main__":
    main()
