"""Find the five landmarks in every image of CASIA-WebFace, or of any folder with one folder of photos per person.

    python mtcnn/casia_landmark.py --casia DIR

writes a tab-separated line `0000045/001.jpg label x1 y1 ... x5 y5` for each image in DIR, in sorted order. Coordinates
are pixels of the whole image, with the image-left eye first. Images without a face are left out, because nothing can
be learned from them; they are counted and listed, and so are people who have no image left. Labels number the remaining
people from 0 in sorted order, without gaps. An interrupted run continues where it stopped.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
from faces.data.casia import LANDMARK_LIST, list_photos, person
from faces.data.sources import Folder
from faces.files import command, folder, script_parser
from faces.landmarks import default_list, write_landmarks
from faces.text import people_count, printable
from mtcnn import landmark_lists as lists


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--casia", type=Path, required=True, metavar="DIR",
                        help="folder that holds one folder per person, such as 0000045/001.jpg")
    lists.add_list_options(parser)
    args = parser.parse_args(argv)
    detector = lists.list_detector(args)    # checks the options, too
    root = folder(args.casia, "one folder of photos per person, such as 0000045/001.jpg")
    paths, notes = list_photos(Folder(root))    # the same that training takes
    for note in notes:
        print(note)
    output = args.output or default_list(root, LANDMARK_LIST)
    with lists.reserved(output):
        journal, unreadable = lists.find_all(root, paths, output, detector, args)
        lists.median_or_stop(journal.finds(), root)
        people = sorted({person(paths[find.index]) for find in journal.finds() if find.points})
        label = {name: i for i, name in enumerate(people)}
        write_landmarks(output, ((paths[find.index], label[person(paths[find.index])], find.points)
                                 for find in journal.finds() if find.points))
        lists.report(paths, journal, unreadable, output, "left out")
        lost = sorted({person(path) for path in paths} - set(people))
        names = printable(" ".join(lost[:10]))
        print(f"{people_count(len(people))}; people without any image left: {len(lost)} {names}".rstrip())
        journal.remove()


if __name__ == "__main__":
    main()
