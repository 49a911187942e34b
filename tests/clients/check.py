"""Whether a folder holds pictures as asked for: PNG, of that size, not of one colour. Prints one line."""

import sys
from pathlib import Path

from PIL import Image

size = tuple(map(int, sys.argv[2].split("x")))
pictures = sorted(Path(sys.argv[1]).glob("*.png"))
assert pictures, "no picture came back"
for path in pictures:
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", size), (path.name, picture.format, picture.size)
        assert any(low != high for low, high in picture.convert("RGB").getextrema()), f"{path.name} is of one colour"
print(f"{len(pictures)} PNG {sys.argv[2]}")
