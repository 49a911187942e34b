"""Whether a folder holds pictures as asked for: PNG, 128 by 64, not of one colour. Prints one line."""

import sys
from pathlib import Path

from PIL import Image

pictures = sorted(Path(sys.argv[1]).glob("*.png"))
assert pictures, "no picture came back"
for path in pictures:
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (128, 64)), (path.name, picture.format, picture.size)
        assert any(low != high for low, high in picture.convert("RGB").getextrema()), f"{path.name} is of one colour"
print(f"{len(pictures)} PNG 128x64")
