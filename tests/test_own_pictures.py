"""Section 9: pictures of any kind and size, from a path or the web; what is no picture is named."""

import io
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, ROOT
from notebooks import cell_by_id, cell_namespace, read
from PIL import Image

NOTEBOOK = Path(os.environ.get("SECTION_9_NOTEBOOK", ROOT / "1_CNN_Model.ipynb"))


@pytest.fixture(scope="module")
def cells():
    """Names of the cells that read and show pictures, with a model that is sure of the class "cat"."""
    import matplotlib

    matplotlib.use("agg")
    pictures = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype="uint8")
    values = {"CLASSES": CLASSES, "DEVICES": 1, "x_test": pictures, "final": None}
    names = cell_namespace(NOTEBOOK, "imports", "say", "read-picture", **values)
    names["view"] = lambda model, images: np.tile(np.eye(10)[3], (len(images), 1))
    yield names
    matplotlib.pyplot.close("all")


def picture_files(folder):
    """Write pictures of many kinds, red in the middle; return their paths."""
    red, wide = Image.new("RGB", (64, 48), (200, 30, 30)), Image.new("RGB", (4000, 3000), (200, 30, 30))
    clear = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
    grey16 = Image.fromarray(np.full((40, 40), 40_000, "uint16"))
    frames = [Image.new("RGB", (40, 40), color) for color in ((200, 30, 30), (0, 0, 255))]
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(folder / "photo.jpg", exif=exif)
    clear.save(folder / "transparent.png")
    red.convert("L").save(folder / "grey.jpg")
    red.resize((16, 16)).save(folder / "icon.png")
    red.convert("P").save(folder / "palette.png")
    red.convert("CMYK").save(folder / "cmyk.jpg")
    grey16.save(folder / "grey16.png")
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    return sorted(folder.iterdir())


def test_own_pictures_of_every_kind(cells, tmp_path):
    found = {path.name: cells["read_picture"](str(path)) for path in picture_files(tmp_path)}
    assert {picture.mode for picture in found.values()} == {"RGB"}
    assert found["photo.jpg"].size == (3000, 4000)
    middle = {
        name: picture.getpixel((picture.width // 2, picture.height // 2)) for name, picture in found.items()
    }
    assert middle["transparent.png"] == (255, 255, 255)
    assert abs(middle["grey16.png"][0] - 40_000 / 257) < 3
    for name in ("photo.jpg", "icon.png", "palette.png", "cmyk.jpg", "animated.gif"):
        assert np.abs(np.subtract(middle[name], (200, 30, 30))).max() < 30, name


@pytest.mark.parametrize("name", ["photo.jpg", "transparent.png", "icon.png", ""])
def test_own_picture_cell(cells, tmp_path, name):
    picture_files(tmp_path)
    namespace = dict(cells) | {"said": []}
    namespace["say"] = namespace["said"].append
    source = cell_by_id(read(NOTEBOOK), "own-pictures").source
    place = str(tmp_path / name) if name else ""
    exec(source.replace('PICTURE = ""', f"PICTURE = {place!r}"), namespace)
    assert len(namespace["said"]) == (1 if name else 3)
    assert all(text.startswith("The model says **") for text in namespace["said"])
    assert namespace["small"].size == (32, 32)
    assert namespace["plt"].get_fignums()


class Answers(BaseHTTPRequestHandler):
    """A web server that has one picture and nothing else."""

    def do_GET(self):
        """Answer with a PNG picture, or 404."""
        found = self.path == "/picture.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        if found:
            data = io.BytesIO()
            Image.new("RGB", (40, 40), "red").save(data, "PNG")
            self.wfile.write(data.getvalue())

    def log_message(self, *arguments):
        """Print nothing."""


def test_own_picture_from_the_web(cells):
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert cells["read_picture"](f"{address}/picture.png").size == (40, 40)
    for place in (f"{address}/nothing.png", "http://127.0.0.1:9/picture.png"):
        with pytest.raises(ValueError, match=f"'{place}' is not the path or web address of a picture"):
            cells["read_picture"](place)
    server.shutdown()
    server.server_close()


def test_what_is_no_picture_is_named(cells, tmp_path):
    (tmp_path / "text.png").write_text("This is a text.")
    for name in ("text.png", "missing.png", "."):
        with pytest.raises(ValueError, match=f"{name}' is not the path or web address of a picture"):
            cells["read_picture"](str(tmp_path / name))
