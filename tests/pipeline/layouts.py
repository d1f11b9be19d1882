"""Small data sets in the layouts that others write."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def picture(seed: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 24), (seed * 37 % 256, seed * 91 % 256, 9)).save(stream, kind)
    return stream.getvalue()


def put(folder: Path, files: Mapping[str, bytes | str]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def coco(tmp_path: Path) -> tuple[str, str]:
    """Two pictures of the 2017 layout, five captions and two; a third that was not fetched."""
    images = put(tmp_path / "val2017", {f"{i:012d}.jpg": picture(i, "JPEG") for i in (9, 25)})
    captions = ["A dog.", "A big dog", "dog on grass", "The dog runs.", "One dog outside"]
    content = {
        "info": {"year": 2017},
        "licenses": [
            {"id": 1, "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "name": "x"},
            {"id": 7, "url": "http://flickr.com/commons/usage/", "name": "No known restrictions"},
        ],
        "images": [
            {
                "id": i,
                "file_name": f"{i:012d}.jpg",
                "license": license,
                "flickr_url": f"http://f/{i}",
            }
            for i, license in ((25, 7), (9, 1), (30, 1))
        ],
        "annotations": [
            *({"id": i, "image_id": 9, "caption": text} for i, text in enumerate(captions)),
            {"id": 50, "image_id": 25, "caption": "A cat. "},
            {"id": 51, "image_id": 25, "caption": ""},
            {"id": 52, "image_id": 30, "caption": "A bird"},
        ],
    }
    return put(tmp_path, {"captions.json": json.dumps(content)}) + "/captions.json", images


def tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    with tarfile.open(path, "w") as out:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def img2dataset(folder: Path, shards: int = 2) -> str:
    """Its output: NNNNNNNNN.jpg, .txt and .json with url, caption and status."""
    folder.mkdir()
    for shard in range(shards):
        members: list[tuple[str, bytes | str]] = []
        for i in range(shard * 10_000, shard * 10_000 + 5):
            said = {"url": f"http://u/{i}", "caption": f"thing {i}", "key": f"{i:09d}",
                    "status": "success", "license": "CC-BY-4.0", "width": 24}  # fmt: skip
            if i % 5 == 4:
                said["status"] = "failed_to_download"
            else:
                members.append((f"{i:09d}.jpg", picture(i, "JPEG")))
            members += [(f"{i:09d}.json", json.dumps(said)), (f"{i:09d}.txt", f"thing {i}")]
        tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return str(folder)
