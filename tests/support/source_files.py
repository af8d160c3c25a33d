"""Small images, tables and archives on disk, and what a source makes of them."""

import io
import json
import tarfile
import zipfile

from PIL import Image


def image(shade, format="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 0, 0)).save(file, format)
    return file.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_json(path, value):
    return write(path, json.dumps(value))


def write_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read(source):
    """(id, caption, red of the first pixel) of all that is usable, and (id, reason) of the rest."""
    good, bad = [], []
    for part in range(len(source.parts)):
        for found in source.read(part):
            if found.skip_reason is not None:
                bad.append((found.id, found.skip_reason))
                continue
            data = found.load()
            loaded = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
            red = loaded.convert("RGB").getpixel((0, 0))[0]
            good.append((found.id, found.caption, round(red / 10) * 10))
    return good, bad
