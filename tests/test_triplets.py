"""triplets/ and storage/: the released format in and out, archives, and pictures of every kind."""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import noise
from PIL import Image, ImageCms, ImageColor, ImageFont

import triplets.format
from storage import files
from storage.images import image_size, load_image, save_image
from toy.scenes import draw
from triplets.fetch import fetch_triplets
from triplets.format import (
    FOLDERS,
    Triplet,
    open_triplets,
    read_triplets,
    write_sample,
    write_triplets,
)
from triplets.preview import draw_preview, wrap

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
HINT = "\n\nOnly focus on the objects inside the red bounding box in the image."


def sample(name="a", **changes):
    seed = sum(name.encode())
    fields = {
        "id": name,
        "question": f"What colour is the sign?{HINT}\n\nA. grün\nB. red",
        "answer": "A",
        "image": noise(40, 40, seed),
        "crops": [noise(16, 16, seed)],
        "boxes": [[1, 2, 9, 10]],
        "extra": {"source": "x"},
    }
    return Triplet(**fields | changes)


def row(**changes):
    return {
        "problem": "<image>\nWhat?",
        "images": ["images/a.png"],
        "teacher_images": ["teacher_images/a.png"],
    } | changes


def data_set(folder, *rows):
    """A folder with a.png in both image folders and the given lines (dicts or raw text) in
    train.jsonl."""
    for key in FOLDERS:
        (folder / key).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / key / "a.png")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def files_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------ the format on disk


def test_a_data_set_has_the_released_keys_and_layout_and_is_read_as_it_was_written(tmp_path):
    written = [sample("a"), sample("b", answer=None, boxes=None)]
    assert write_triplets(tmp_path, iter(written)) == 2
    first, second = map(json.loads, (tmp_path / "train.jsonl").open(encoding="utf-8"))
    question = sample().question
    assert first == {
        "problem": "<image>\n" + question,
        "answer": "A",
        "images": ["images/a.png"],
        "teacher_images": ["teacher_images/a.png"],
        "bbox": [1, 2, 9, 10],
        "extra_info": {"source": "x", "id": "a", "question": question, "answer": "A"},
    }
    assert second["answer"] == second["extra_info"]["answer"] == ""
    pictures = [f"{key}/{name}.png" for key in FOLDERS for name in "ab"]
    assert files_in(tmp_path) == [*pictures, "train.jsonl"]

    read = read_triplets(str(tmp_path))
    for triplet in read:
        triplet.extra = {"source": triplet.extra["source"]}
        triplet.image = load_image(triplet.image)
        triplet.crops = list(map(load_image, triplet.crops))
    assert read == written


def test_several_crops_have_a_file_and_a_box_each(tmp_path):
    boxes = [[1, 2, 9, 10], [20, 21, 30, 31]]
    crops = [noise(16, 16, 5), noise(8, 24, 6)]
    boxless = sample("b", crops=crops[::-1], boxes=None)
    write_triplets(tmp_path, [sample("a", crops=crops, boxes=boxes), boxless, sample("c")])
    lines = list(map(json.loads, (tmp_path / "train.jsonl").open()))
    assert lines[0]["teacher_images"] == ["teacher_images/a-1.png", "teacher_images/a-2.png"]
    assert [line["bbox"] for line in lines] == [boxes, None, [1, 2, 9, 10]]
    first, second, third = read_triplets(tmp_path)
    for read, wanted in ((first, crops), (second, crops[::-1])):
        assert [load_image(crop).tobytes() for crop in read.crops] == [c.tobytes() for c in wanted]
    assert [read.boxes for read in (first, second, third)] == [boxes, None, [[1, 2, 9, 10]]]
    files = [first.image, first.crops[1]]
    assert first.bytes == sum(path.stat().st_size for path in files)
    assert third.bytes == third.image.stat().st_size


@pytest.mark.parametrize(
    "samples",
    [
        [sample(crops=[])],
        [sample(crops=[noise(8, 8)] * 2)],
        [sample("a-2"), sample("a", crops=[noise(8, 8)] * 2, boxes=None)],
    ],
)
def test_crops_without_a_box_or_a_file_of_their_own_are_refused(samples, tmp_path):
    with pytest.raises(ValueError, match="sample 'a'.*crops"):
        write_triplets(tmp_path, samples)
    assert not (tmp_path / "train.jsonl").exists()


def test_full_images_can_be_jpeg_in_full_colour_resolution(tmp_path):
    data_set(tmp_path)
    line = write_sample(tmp_path, sample(image=Image.new("RGB", (8, 8), "red")), ".jpg")
    [read] = read_triplets(data_set(tmp_path, line))
    assert (read.image.suffix, read.crops[0].suffix) == (".jpg", ".png")
    with Image.open(read.image) as image:
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3
        assert abs(np.asarray(image, int) - (255, 0, 0)).max() <= 2


def test_released_rows_without_ids_are_numbered_and_keep_their_hint(tmp_path):
    about = {"answer": "D", "question": "What?"}
    other = row(problem=f"<image>\nWhat?{HINT}", answer="D", original_images=[], extra_info=about)
    image, crop = (tmp_path / key / "a.png" for key in FOLDERS)
    assert read_triplets(data_set(tmp_path, row(), other, "")) == [
        Triplet("000000", "What?", image, [crop]),
        Triplet("000001", f"What?{HINT}", image, [crop], answer="D", extra=about),
    ]


@pytest.mark.parametrize(
    "line, found",
    [
        ('{"problem": "<im', "no JSON"),
        ('{"problem": ' + "[" * 100_000, "no JSON"),
        ("version https://git-lfs.github.com/spec/v1", "git-lfs"),
        ("[]", "found list"),
        ('{"problem": "<image>\\nWhat?"}', "found ['problem']"),
        (row(problem="What?"), "no other tag; found []"),
        (row(problem="<image>\nWhat is <image>?"), "['<image>', '<image>']"),
        (row(problem="What? <image>"), "one <image>"),
        (row(problem="<image>\n "), "one <image>"),
        (row(problem="<image>\n<|image_pad|>?<|im_end|>"), "'<|image_pad|>', '<|im_end|>'"),
        (row(problem=7), "one <image>"),
        (row(problem="<image>\nhalf a \ud83d?"), "UTF-8"),
        (row(answer=["red", "crimson"]), "answer is ['red', 'crimson']"),
        (row(answer=True), "answer is True"),
        (row(answer=float("nan")), "answer is nan"),
        (row(answer=float("inf")), "answer is inf"),
        (row(images=[]), "images is []"),
        (row(images="images/a.png"), "one file name"),
        (row(images=["images/a.png"] * 2), "one file name"),
        (row(images=["images"]), "one file name"),
        (row(teacher_images=[None]), "teacher_images is [None]"),
        (row(images=["images/b.png"]), "no such file"),
        (row(teacher_images=["crops/a.png"]), "crops"),
        (row(bbox=[1, 2, 3]), "bbox is [1, 2, 3]"),
        (row(bbox=[1, 2, 3, math.inf]), "bbox is [1, 2, 3, inf]"),
        (row(bbox=[[1, 2, 3, 4]] * 2), "bbox is [[1, 2, 3, 4], [1, 2, 3, 4]]"),
        (row(teacher_images=["teacher_images/a.png"] * 2, bbox=[1, 2, 3, 4]), "bbox is [1,"),
        (row(teacher_images=[]), "teacher_images is []"),
        (row(teacher_images=["teacher_images/a.png", "teacher_images/b.png"]), "teacher_images[1]"),
        (row(extra_info={"id": "000000"}), "line 1 too"),
        (row(extra_info="x"), "extra_info is 'x'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, found):
    data_set(tmp_path, row(), line)
    where = f"{tmp_path}/train.jsonl, line 2: "
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{where}.*{re.escape(found)}"):
        read_triplets(tmp_path)
    with pytest.raises(ValueError, match="no rows"):
        read_triplets(data_set(tmp_path, ""))


def test_reading_lists_directories_instead_of_asking_for_every_file(tmp_path, monkeypatch):
    data_set(tmp_path, *[row()] * 500)
    listdir = Mock(wraps=os.listdir)
    monkeypatch.setattr(os, "listdir", listdir)
    assert len(read_triplets(tmp_path)) == 500
    assert listdir.call_count == 2


@pytest.mark.parametrize(
    "samples, found",
    [
        ([sample(), sample()], "repeated"),
        ([sample("../a")], "file name"),
        ([sample("")], "file name"),
        ([sample(question="<image> what?")], "holds a tag"),
        ([sample(question=" ")], "is empty"),
        ([], "no samples"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, samples, found):
    with pytest.raises(ValueError, match=found):
        write_triplets(tmp_path, samples)
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("full_at", ["images/b.png", "teacher_images/b.png", "train.jsonl"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, full_at):
    replace = os.replace

    def replace_until_full(source, target):
        if target == tmp_path / full_at:
            raise NO_SPACE
        replace(source, target)

    samples = [sample("a"), sample("b")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_full)
        with pytest.raises(OSError, match="MB free") as error:
            write_triplets(tmp_path, samples)
    assert error.value.errno == errno.ENOSPC
    for file in files_in(tmp_path):
        assert file.endswith(("/a.png", "/b.png"))  # no train.jsonl, nothing temporary
        load_image(tmp_path / file)
    assert write_triplets(tmp_path, samples) == 2
    with pytest.raises(FileExistsError):  # nothing is overwritten
        write_triplets(tmp_path, samples)


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "none" / "x", "text")


# ---------------------------------------------------------------------------- JSON of a killed run


def test_lines_outlive_a_kill(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"loss": NaN}\n\n{"torn')
    with files.appending(path) as log:
        log.write('{"step": 2}\n')
    notes = []
    assert files.read_jsonl(path, notes) == [{"loss": None}, {"step": 2}]
    assert files.read_jsonl(tmp_path / "none.jsonl", notes) == []
    assert files.read_json(path, notes) == files.read_json(tmp_path / "none.json", notes) == {}
    assert len(notes) == 4
    files.write(path, '{"loss": NaN}')
    assert files.read_json(path, notes) == {"loss": "NaN"}


# ---------------------------------------------------------------------------------------- fetching


PARTS = ("images.tar.gz00", "images.tar.gz01", "images.tar.gz02")


def hub_layout(folder, prefix="", parts=PARTS, extra=None):
    """The released layout of three samples, images in several parts, their names after `prefix`.
    extra: a further member of both archives. Returns the samples."""
    samples = [sample(name) for name in "abc"]
    write_triplets(folder, samples)
    for key in FOLDERS:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for path in (folder / key).iterdir():
                archive.add(path, f"{prefix.format(key)}{path.name}")
                path.unlink()
            if extra:
                archive.addfile(extra, io.BytesIO(b"evil"))
        names = parts if key == "images" else ["teacher_images.tar.gz"]
        data = buffer.getvalue()
        step = -(-len(data) // len(names))
        for k, name in enumerate(names):
            (folder / key / name).write_bytes(data[k * step : (k + 1) * step])
    return samples


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = 4 if kind == tarfile.REGTYPE else 0
    return info


def assert_unpacked(folder, samples):
    """All pictures of the samples, none else, and nothing of the work."""
    read = read_triplets(folder) if samples else []
    assert [load_image(triplet.image) for triplet in read] == [each.image for each in samples]
    assert len(list(folder.rglob("*.png"))) == 2 * len(samples)
    assert not list(folder.glob(".*"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


@pytest.mark.parametrize(
    "prefix, parts",
    [
        ("", ("images.tar.gz",)),
        ("{}/", PARTS),
        ("./{}/", ("images.tar.gz.part-aa", "images.tar.gz.part-ab")),
    ],
)
def test_split_archives_of_either_layout_are_unpacked(folder, prefix, parts):
    samples = hub_layout(folder, prefix, parts)
    assert fetch_triplets(str(folder)) == folder
    assert_unpacked(folder, samples)
    for archive in folder.rglob("*.tar.gz*"):  # needed no more
        archive.unlink()
    assert fetch_triplets(folder) == folder


@pytest.mark.parametrize(
    "extra",
    [
        member("../../evil.png"),
        member("a/../../../evil.png"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard", tarfile.LNKTYPE, "a.png"),
        member("device", tarfile.CHRTYPE),
    ],
)
def test_archives_that_reach_out_of_their_folder_are_refused(folder, extra):
    hub_layout(folder, extra=extra)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        fetch_triplets(folder)
    assert not list(folder.parent.rglob("evil.png"))
    assert_unpacked(folder, [])


@pytest.mark.parametrize("damage", [0, 1, 2, "checksum", "pointer"])
def test_a_damaged_archive_is_noticed_and_nothing_of_it_kept(folder, damage):
    hub_layout(folder)
    parts = sorted((folder / "images").iterdir())
    if damage == "checksum":
        data = parts[-1].read_bytes()
        parts[-1].write_bytes(data[:-8] + b"\0\0\0\0" + data[-4:])
    elif damage == "pointer":
        parts[0].write_text("version https://git-lfs.github.com/spec/v1\n")
    else:  # a missing part
        parts[damage].unlink()
    with pytest.raises(ValueError, match=r"images\.tar\.gz0.*cannot be unpacked"):
        fetch_triplets(folder)
    assert_unpacked(folder, [])


@pytest.mark.parametrize("place, name", [(tarfile.TarFile, "extractall"), (os, "replace")])
def test_an_interrupted_unpacking_starts_over(folder, monkeypatch, place, name):
    samples = hub_layout(folder)
    true = getattr(place, name)

    def killed(*args, **how):
        true(*args, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed)
        # a killed process tidies nothing
        patch.setattr(shutil, "rmtree", Mock())
        with pytest.raises(KeyboardInterrupt):
            fetch_triplets(folder)
    [scratch] = folder.glob(".unpacking-*")
    (scratch / "torn.png").write_bytes(b"half")
    fetch_triplets(folder)
    assert_unpacked(folder, samples)  # and no torn.png


def test_a_disk_that_fills_up_while_unpacking_says_so_and_is_tidied(folder, monkeypatch):
    hub_layout(folder)
    monkeypatch.setattr(tarfile.TarFile, "makefile", Mock(side_effect=NO_SPACE))
    with pytest.raises(OSError, match="MB free"):
        fetch_triplets(folder)
    assert_unpacked(folder, [])


def test_a_hub_data_set_is_downloaded_once_into_the_working_directory(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(hub_id, repo_type, local_dir, allow_patterns):
        asked.append((hub_id, repo_type))
        hub_layout(local_dir)
        return str(local_dir)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for _ in range(2):
        assert fetch_triplets("owner/Set-1.0") == Path("data/owner/Set-1.0")
    assert asked == [("owner/Set-1.0", "dataset")]
    assert len(read_triplets("data/owner/Set-1.0")) == 3


@pytest.mark.parametrize(
    "data, message",
    [
        ("data/mien", r"'data/mien' is no folder here.* \(\w+Error: .+hf auth login"),
        ("../mine", r"^\.\./mine has no train.jsonl"),  # and not data/../mine
        ("data/mine", "^data/mine has no train.jsonl"),
        ("/nowhere", "^/nowhere has no train.jsonl"),
    ],
)
def test_what_is_no_data_set_is_named_with_the_ways_out(data, message, tmp_path, monkeypatch):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        fetch_triplets(data)


# ---------------------------------------------------------------------------------------- pictures


def test_sixteen_bit_pictures_are_shifted_not_saturated(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.asarray(load_image(tmp_path / "x.png"))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGBA", "#00000000", "white"),
        ("RGBA", "#ff0000ff", "red"),
        ("RGBA", "#00000033", "#cccccc"),
        ("LA", "#00000000", "white"),
        ("CMYK", "red", "red"),
        ("1", "white", "white"),
        ("L", "#070707", "#070707"),
        ("P", "red", "white"),  # a see-through palette entry
    ],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, colour, expected):
    image = Image.new("RGBA", (3, 2), colour).convert(mode)
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image.save(path, **{"transparency": image.getpixel((0, 0))} if mode == "P" else {})
    read = load_image(path)
    assert read.mode == "RGB"
    assert read.tobytes() == Image.new("RGB", (3, 2), expected).tobytes()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_exif_rotation_is_applied(tmp_path):
    image = noise(20, 10)
    image.save(tmp_path / "x.png", exif=turned(6))  # shown turned by 90 degrees, clockwise
    upright = image.rotate(-90, expand=True)
    assert load_image(tmp_path / "x.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_rotated_uncompressed_tiffs_are_upright_and_whole(tmp_path, mode):
    ramp = np.arange(64, dtype=np.uint8).repeat(16).reshape(64, 16) * 3  # from the top
    image = Image.fromarray(ramp.astype(np.uint16) << 8)
    if mode != "I;16":
        image = Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / "x.tiff", exif=turned(8))
    read = np.asarray(load_image(tmp_path / "x.tiff").convert("L"), int)
    assert read.shape == (16, 64)
    assert (np.diff(read, axis=1) > 0).all()


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_what_is_written_has_no_colour_profile_of_its_source(tmp_path, name):
    image = Image.new("RGB", (9, 9))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save_image(image, tmp_path / name)
    assert "icc_profile" not in Image.open(tmp_path / name).info


def test_an_animation_gives_its_first_frame(tmp_path):
    red = Image.new("RGB", (4, 4), "red")
    red.save(tmp_path / "x.gif", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert load_image(tmp_path / "x.gif").tobytes() == red.tobytes()


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_pictures_that_are_not_whole_are_errors_that_name_the_file(tmp_path, name):
    path = tmp_path / name
    noise(200, 200).save(path)
    data = path.read_bytes()
    for content in (data[: len(data) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} \({len(content):,} bytes\)"):
            load_image(path)


@pytest.mark.parametrize("read", [load_image, image_size])
def test_what_is_no_file_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, kind in (("none.png", "not there"), ("", "no plain file"), ("pipe.png", "no plain")):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path / name} is {kind}"):
            read(tmp_path / name)


def test_pixels_of_no_known_range_are_refused(tmp_path):
    Image.new("F", (2, 2)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="floating point"):
        load_image(tmp_path / "x.tiff")


# --------------------------------------------------------------------------------------- the sheet


def test_the_contact_sheet_takes_any_data_set(tmp_path):
    wide = Image.new("RGB", (3000, 500), "blue")
    tall = Image.new("RGB", (7, 900), "green")
    samples = [
        sample("a", image=wide, crops=[tall], question="word " * 200, boxes=None, answer=None),
        sample("b", question="x" * 500, answer="y" * 500),
    ]
    write_triplets(tmp_path, samples)
    assert draw_preview(tmp_path) == tmp_path / "preview.png"
    sheet = np.asarray(load_image(tmp_path / "preview.png"))
    assert sheet.shape[1] < 1500
    yellow = (sheet == (255, 255, 0)).all(-1)
    assert yellow.sum() > 4 * 50  # one box is noted, and marked


def test_the_contact_sheet_shows_all_boxes_and_all_crops(tmp_path):
    image = Image.new("RGB", (100, 100))
    crops = [Image.new("RGB", (40, 40), name) for name in ("green", "blue", "purple")]
    boxes = [[10, 10, 20, 20], [70, 70, 90, 90], [70, 10, 80, 20]]
    write_triplets(tmp_path, [sample(image=image, crops=crops, boxes=boxes)])
    sheet = np.asarray(load_image(draw_preview(tmp_path)))
    for left, top, right, bottom in boxes:  # the image is 256 px wide there, 14 px from the corner
        x, y = round(14 + 2.56 * (left + right) / 2), round(14 + 2.56 * (top + bottom) / 2)
        yellow = (sheet == (255, 255, 0)).all(-1)
        sides = yellow[y, x:], yellow[y, :x], yellow[y:, x], yellow[:y, x]
        assert all(side.any() for side in sides)
    found = [(sheet == ImageColor.getrgb(name)).all(-1) for name in ("green", "blue", "purple")]
    assert all(one.sum() > 60 * 60 for one in found)
    lefts = [one.any(0).argmax() for one in found]
    assert lefts == sorted(lefts)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 300,
        "x" * 900,
        "一个很长的问题没有空格" * 40,
        "W" * 40 + "\n\nA. bark\nB. moss",
        "",
        "i" * 80 + " W" * 80,
    ],
)
def test_the_contact_sheet_wraps_by_width_in_any_script(text):
    font = ImageFont.load_default(18)
    lines = wrap(text, font, 12)
    assert len(lines) <= 12
    assert all(font.getlength(line) <= 640 for line in lines)
    if font.getlength(text) < 3000:
        assert "".join("".join(lines).split()) == "".join(text.split())


# ------------------------------------------------------------------------------------- large files


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A data set of 40 rows that counts as a large one."""
    draw(tmp_path, 40, 0)
    monkeypatch.setattr(triplets.format, "AT_ONCE", 0)
    return tmp_path


def test_a_large_file_gives_the_rows_of_a_small_one(large):
    path = large / "train.jsonl"
    # A blank line, and a last one that is not ended.
    path.write_text(path.read_text().replace("\n", "\n\n", 1).rstrip("\n"))
    lazy = open_triplets(large)
    assert not isinstance(lazy, list)
    assert list(lazy) == read_triplets(large)
    assert len(lazy) == 40
    assert lazy.sha256.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_bad_row_of_a_large_file_is_named_when_it_is_read(large):
    path = large / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[7] = "{"
    path.write_text("\n".join(lines))
    lazy = open_triplets(large)
    assert lazy[6].id != lazy[8].id
    with pytest.raises(ValueError, match=r"train.jsonl, line 8"):
        lazy[7]


def test_a_large_file_without_its_images_says_so_at_once(large):
    shutil.rmtree(large / "images")
    with pytest.raises(FileNotFoundError, match=r"train.jsonl, line 1"):
        open_triplets(large)
