"""Find the five landmarks of every image of CASIA-WebFace, or of any folder with one folder of photos a person.

    python casia_landmark.py --casia DIR

writes a line `0000045/001.jpg label x1 y1 ... x5 y5`, tab separated, for each image below DIR, in sorted order; pixels
of the whole image, image-left eye first. Labels count the folders from 0 in sorted order. An image in which no face is
found would teach nothing and is left out, counted and listed; so is a person of whom no image is left, and labels have
no gap. A run that was stopped continues.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.files import InputError, command, folder
from faces.images import list_images
from faces.landmarks import default_list, write_landmarks
from mtcnn.detector import make_detector
from mtcnn.landmark_lists import add_list_options, find_all, median_or_stop, report


def person(path):
    """Return the name of the person's folder that an image is in."""
    return path.split("/")[0]


def list_people(root):
    """Return the paths of the images of all people, sorted.

    Raises:
        InputError: no images, or one that is in no person's folder.
    """
    paths = list_images(root)
    if not paths:
        raise InputError(f"{root} holds no images; give the folder that holds one folder a person, as 0000045/001.jpg.")
    for path in paths:
        if "/" not in path:
            raise InputError(f"{root / path} is in no person's folder; move it, or give the folder that holds one "
                             "folder a person, as 0000045/001.jpg.")
    return paths


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--casia", type=Path, required=True, metavar="DIR",
                        help="folder that holds one folder a person, as 0000045/001.jpg")
    add_list_options(parser)
    args = parser.parse_args(argv)
    root = folder(args.casia, "one folder of photos a person, as 0000045/001.jpg")
    paths = list_people(root)
    output = args.output or default_list(root, "casia_landmark.txt")
    journal, unreadable = find_all(root, paths, output, make_detector(args), args)
    median_or_stop(journal.finds(), root)
    people = sorted({person(paths[find.index]) for find in journal.finds() if find.points})
    label = {name: i for i, name in enumerate(people)}
    write_landmarks(output, ((paths[find.index], label[person(paths[find.index])], find.points)
                             for find in journal.finds() if find.points))
    report(paths, journal, unreadable, output, "left out")
    lost = sorted({person(path) for path in paths} - set(people))
    print(f"{len(people)} people; without an image that is left: {len(lost)} {' '.join(lost[:10])}".rstrip())
    journal.remove()


if __name__ == "__main__":
    main()
