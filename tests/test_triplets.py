"""triplets.py: the released format in and out, archives, and pictures of every kind."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import storage.hub as hub
import storage.images as images
import triplets.fetch as fetching
import triplets.format as triplet_format
import triplets.preview as previews

HINT = "\n\nOnly focus on the objects inside the red bounding box in the image to answer this question."


def sample(name="a", **changes):
    noise = np.random.default_rng(sum(map(ord, name)))
    picture = lambda side: Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8))
    fields = {
        "id": name,
        "question": f"What colour is the sign?{HINT}\n\nA. grün\nB. red",
        "answer": "A",
        "image": picture(40),
        "crop": picture(16),
        "bbox": [1, 2, 9, 10],
        "extra": {"source": "x"},
    }
    return triplet_format.Triplet(**fields | changes)


def row(**changes):
    return {
        "problem": "<image>\nWhat?",
        "images": ["images/a.png"],
        "teacher_images": ["teacher_images/a.png"],
    } | changes


def data_set(folder, *rows):
    """A folder with a.png in both image folders and the given lines (dicts or raw text) in train.jsonl."""
    for key in triplet_format.FOLDERS:
        (folder / key).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / key / "a.png")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def pixels(image):
    return np.asarray(image, dtype=int)


# ---------------------------------------------------------------------------------------------------- the format on disk


def test_a_written_data_set_has_the_released_keys_and_layout(tmp_path):
    assert (
        triplet_format.write_triplets(tmp_path, [sample("a"), sample("b", answer=None, bbox=None)])
        == 2
    )
    first, second = map(
        json.loads, (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    )
    question = sample().question
    assert first == {
        "problem": "<image>\n" + question,
        "answer": "A",
        "images": ["images/a.png"],
        "teacher_images": ["teacher_images/a.png"],
        "bbox": [1, 2, 9, 10],
        "extra_info": {"source": "x", "id": "a", "question": question, "answer": "A"},
    }
    assert second["answer"] == second["extra_info"]["answer"] == "" and second["bbox"] is None
    assert sorted(
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()
    ) == [
        "images/a.png",
        "images/b.png",
        "teacher_images/a.png",
        "teacher_images/b.png",
        "train.jsonl",
    ]


def test_what_is_written_is_read_back(tmp_path):
    written = [sample("b"), sample("a", answer=None, bbox=None)]
    triplet_format.write_triplets(tmp_path, iter(written))
    for before, after in zip(written, triplet_format.read_triplets(str(tmp_path)), strict=True):
        for key in ("id", "question", "answer", "bbox"):
            assert getattr(before, key) == getattr(after, key)
        assert after.extra["source"] == "x"
        for key in ("image", "crop"):
            assert (pixels(images.load_image(getattr(after, key))) == pixels(getattr(before, key))).all()


def test_full_images_can_be_jpeg_in_full_colour_resolution(tmp_path):
    for folder in triplet_format.FOLDERS:
        (tmp_path / folder).mkdir()
    line = triplet_format.write_sample(
        tmp_path, sample(image=Image.new("RGB", (8, 8), "red")), ".jpg"
    )
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    [read] = triplet_format.read_triplets(tmp_path)
    with Image.open(read.image) as image:
        assert (image.format, read.image.suffix, read.crop.suffix) == ("JPEG", ".jpg", ".png")
        assert all(component[1:3] == (1, 1) for component in image.layer)
        assert abs(pixels(image) - (255, 0, 0)).max() <= 2


def test_released_rows_without_ids_are_numbered_and_keep_their_hint(tmp_path):
    other = row(
        problem=f"<image>\nWhat?{HINT}",
        answer="D",
        original_images=["x"],
        extra_info={"answer": "D", "question": "What?"},
    )
    first, second = triplet_format.read_triplets(data_set(tmp_path, row(), other, ""))
    assert (first.id, second.id) == ("000000", "000001")
    assert first.answer is None and first.bbox is None and first.extra == {}
    assert second.question == f"What?{HINT}" and second.extra["question"] == "What?"
    assert second.crop == tmp_path / "teacher_images" / "a.png"


@pytest.mark.parametrize(
    "line, found",
    [
        ('{"problem": "<im', "no JSON"),
        ("version https://git-lfs.github.com/spec/v1", "git-lfs"),
        ("[]", "found list"),
        ('{"problem": "<image>\\nWhat?"}', "found ['problem']"),
        (row(problem="What?"), "image tags []"),
        (row(problem="<image>\nWhat is <image>?"), "['<image>', '<image>']"),
        (row(problem="What? <image>"), "Expected one <image>, at the start"),
        (row(problem="<image>\n "), "Expected one <image>"),
        (row(problem="<image>\n<|image_pad|>?"), "<|image_pad|>"),
        (row(problem=7), "Expected one <image>"),
        (row(images=[]), "images is []"),
        (row(images="images/a.png"), "Expected a list of one file name"),
        (row(images=["images/a.png"] * 2), "Expected a list of one file name"),
        (row(images=[""]), "Expected a list of one file name"),
        (row(images=["images"]), "Expected a list of one file name"),
        ('{"problem": ' + "[" * 100_000, "no JSON"),
        (row(teacher_images=[None]), "teacher_images is [None]"),
        (row(bbox=[1, 2, 3]), "bbox is [1, 2, 3]"),
        (row(images=["images/b.png"]), "images[0] is 'images/b.png', and no such file"),
        (row(teacher_images=["crops/a.png"]), "teacher_images[0] is 'crops/a.png'"),
        (row(extra_info={"id": "000000"}), "is that of line 1 too"),
        (row(extra_info="x"), "extra_info is 'x'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, found):
    data_set(tmp_path, row(), line)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        triplet_format.read_triplets(tmp_path)
    assert f"{tmp_path / 'train.jsonl'}, line 2: " in str(error.value) and found in str(error.value)


def test_an_empty_data_set_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        triplet_format.read_triplets(data_set(tmp_path, ""))


def test_reading_lists_directories_instead_of_asking_for_every_file(tmp_path, monkeypatch):
    data_set(tmp_path, *[row() for _ in range(500)])
    calls, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: calls.append(place) or listdir(place))
    assert len(triplet_format.read_triplets(tmp_path)) == 500
    assert len(calls) == 2


@pytest.mark.parametrize(
    "samples, found",
    [
        ([sample(), sample()], "repeated"),
        ([sample("../a")], "no plain file name"),
        ([sample("")], "no plain file name"),
        ([sample(question="<image> what?")], "image tag"),
        ([sample(question=" ")], "is empty"),
        ([], "no samples"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, samples, found):
    with pytest.raises(ValueError, match=found):
        triplet_format.write_triplets(tmp_path, samples)
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_a_data_set_is_not_overwritten(tmp_path):
    data_set(tmp_path, row())
    with pytest.raises(FileExistsError, match="another folder"):
        triplet_format.write_triplets(tmp_path, [sample()])


@pytest.mark.parametrize("full_at", ["images/b.png", "teacher_images/b.png", "train.jsonl"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, full_at):
    replace = os.replace

    def replace_until_full(source, target):
        if Path(target) == tmp_path / full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_until_full)
    with pytest.raises(OSError, match="MB free.*make room") as error:
        triplet_format.write_triplets(tmp_path, [sample("a"), sample("b")])
    assert error.value.errno == errno.ENOSPC
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} <= {"a.png", "b.png"}  # no train.jsonl, nothing temporary
    for path in files:
        images.load_image(path)
    monkeypatch.undo()
    assert triplet_format.write_triplets(tmp_path, [sample("a"), sample("b")]) == 2


# -------------------------------------------------------------------------------------------------------------- fetching


def tar_gz(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def hub_layout(
    folder,
    prefixes=("", ""),
    names=("images.tar.gz00", "images.tar.gz01", "images.tar.gz02"),
    extra=None,
):
    """The released layout of three samples, images split over several parts. Returns the samples."""
    source = folder.with_name(folder.name + "-source")
    triplet_format.write_triplets(source, samples := [sample(name) for name in "abc"])
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((source / "train.jsonl").read_bytes())
    for key, prefix in zip(triplet_format.FOLDERS, prefixes):
        (folder / key).mkdir()
        data = tar_gz(
            {prefix + p.name: p.read_bytes() for p in sorted((source / key).iterdir())}
            | (extra or {})
        )
        files = names if key == "images" else ["teacher_images.tar.gz"]
        step = -(-len(data) // len(files))
        for k, name in reversed(list(enumerate(files))):
            (folder / key / name).write_bytes(data[k * step : (k + 1) * step])
    return samples


@pytest.mark.parametrize(
    "prefixes", [("", ""), ("images/", "teacher_images/"), ("./images/", "./")]
)
@pytest.mark.parametrize(
    "names",
    [
        ("images.tar.gz",),
        ("images.tar.gz00", "images.tar.gz01", "images.tar.gz02"),
        ("images.tar.gz.part-aa", "images.tar.gz.part-ab"),
    ],
)
def test_split_archives_of_either_layout_are_unpacked(tmp_path, prefixes, names):
    samples = hub_layout(tmp_path / "set", prefixes, names)
    assert fetching.fetch_triplets(str(tmp_path / "set")) == tmp_path / "set"
    for before, after in zip(samples, triplet_format.read_triplets(tmp_path / "set"), strict=True):
        assert (pixels(images.load_image(after.image)) == pixels(before.image)).all()
    assert not list((tmp_path / "set").glob(".*"))


def test_unpacked_images_need_no_archives_any_more(tmp_path, monkeypatch):
    hub_layout(tmp_path / "set")
    fetching.fetch_triplets(tmp_path / "set")
    monkeypatch.setattr(hub, "unpack", lambda *_: pytest.fail("unpacked twice"))
    for archive in (tmp_path / "set").rglob("*.tar.gz*"):
        archive.unlink()
    assert fetching.fetch_triplets(tmp_path / "set") == tmp_path / "set"


@pytest.mark.parametrize(
    "member", ["../../evil.png", "a/../../../evil.png", "link", "hard", "device"]
)
def test_archives_that_reach_out_of_their_folder_are_refused(tmp_path, member):
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    evil = b"evil"
    if member in kinds:
        evil = tarfile.TarInfo(member)
        evil.type, evil.linkname = kinds[member], "/etc/passwd" if member == "link" else "a.png"
    hub_layout(tmp_path / "set", extra={member: evil})
    with pytest.raises(ValueError, match="cannot be unpacked"):
        fetching.fetch_triplets(tmp_path / "set")
    assert not list(tmp_path.rglob("evil.png")) and not list((tmp_path / "set").rglob("*.png"))
    assert not list((tmp_path / "set").glob(".*"))


def test_absolute_member_names_stay_inside(tmp_path):
    hub_layout(tmp_path / "set", extra={f"{tmp_path}/evil.png": b"evil"})
    fetching.fetch_triplets(tmp_path / "set")
    assert not (tmp_path / "evil.png").exists()


@pytest.mark.parametrize(
    "damage",
    ["first part missing", "middle part missing", "last part missing", "checksum", "pointer"],
)
def test_a_damaged_archive_is_noticed_and_nothing_of_it_kept(tmp_path, damage):
    hub_layout(tmp_path / "set")
    parts = sorted((tmp_path / "set" / "images").iterdir())
    if damage == "checksum":
        data = parts[-1].read_bytes()
        parts[-1].write_bytes(data[:-8] + b"\0\0\0\0" + data[-4:])
    elif damage == "pointer":
        for part in parts:
            part.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        parts[["first", "middle", "last"].index(damage.split()[0])].unlink()
    with pytest.raises(ValueError, match=r"images\.tar\.gz0.*cannot be unpacked.*fetch it again"):
        fetching.fetch_triplets(tmp_path / "set")
    assert not list((tmp_path / "set").rglob("*.png")) and not list((tmp_path / "set").glob(".*"))


@pytest.mark.parametrize("when", ["while unpacking", "while moving"])
def test_an_interrupted_unpacking_starts_over(tmp_path, monkeypatch, when):
    samples = hub_layout(tmp_path / "set")
    calls, replace, extract = [], os.replace, tarfile.TarFile.extractall

    def killed(*args, **kwargs):
        calls.append(args)
        if when == "while unpacking":
            extract(*args, **kwargs)
        if when == "while unpacking" or len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(
        *((tarfile.TarFile, "extractall") if when == "while unpacking" else (os, "replace")), killed
    )
    monkeypatch.setattr(
        shutil, "rmtree", lambda *args, **kwargs: None
    )  # a killed process tidies nothing up
    with pytest.raises(KeyboardInterrupt):
        fetching.fetch_triplets(tmp_path / "set")
    monkeypatch.undo()
    assert list((tmp_path / "set").glob(".unpacking-*"))
    (tmp_path / "set" / ".unpacking-images" / "torn.png").write_bytes(b"half")
    fetching.fetch_triplets(tmp_path / "set")
    read = triplet_format.read_triplets(tmp_path / "set")
    for after, before in zip(read, samples, strict=True):
        assert (pixels(images.load_image(after.image)) == pixels(before.image)).all()
    assert not list((tmp_path / "set").rglob("torn.png")) and not list(
        (tmp_path / "set").glob(".*")
    )


def test_a_disk_that_fills_up_while_unpacking_says_so_and_is_tidied(tmp_path, monkeypatch):
    hub_layout(tmp_path / "set")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "makefile", full)
    with pytest.raises(OSError, match="MB free") as error:
        fetching.fetch_triplets(tmp_path / "set")
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "set").rglob("*.png")) and not list((tmp_path / "set").glob(".*"))


def test_fetching_what_is_not_there_says_what_is(tmp_path):
    (tmp_path / "other.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"has no train.jsonl.*other\.jsonl"):
        fetching.fetch_triplets(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder.*Expected a data set"):
        fetching.fetch_triplets(str(tmp_path / "nowhere"))


def test_a_hub_data_set_is_downloaded_once_into_the_working_directory(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(hub_id, repo_type, local_dir, allow_patterns):
        asked.append((hub_id, repo_type))
        Path(local_dir).parent.mkdir(parents=True)
        hub_layout(Path(local_dir))
        return local_dir

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for _ in range(2):
        assert fetching.fetch_triplets("owner/Set-1.0") == Path("data/owner/Set-1.0")
    assert asked == [("owner/Set-1.0", "dataset")]
    assert len(triplet_format.read_triplets(Path("data/owner/Set-1.0"))) == 3


def test_a_failed_download_names_the_id_and_the_ways_out(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)

    def snapshot_download(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"^\.\./mine has no train.jsonl \(no such folder\)"
    ):
        fetching.fetch_triplets("../mine")  # a path, and not data/../mine
    with pytest.raises(
        FileNotFoundError, match=r"'data/mien' is no folder.*no route.*hf auth login"
    ):
        fetching.fetch_triplets("data/mien")


# -------------------------------------------------------------------------------------------------------------- pictures


def test_sixteen_bit_pictures_are_shifted_not_saturated(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        read = images.load_image(tmp_path / name)
        assert read.mode == "RGB" and pixels(read)[0].tolist() == [
            [v, v, v] for v in (0, 0, 1, 128, 255)
        ]


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("P", 3, None),
    ],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, colour, expected):
    image = Image.new(mode, (3, 2), colour)
    if mode == "P":
        image.putpalette(list(range(30)))
        image.save(tmp_path / "x.png", transparency=3)  # a see-through palette entry
    else:
        image.save(tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    read = images.load_image(next(tmp_path.iterdir()))
    assert read.mode == "RGB" and read.size == (3, 2)
    assert read.getpixel((0, 0)) == (expected or (255, 255, 255))


def test_exif_rotation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (20, 10), "white"), Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees, clockwise
    image.paste("black", (0, 0, 10, 10))
    image.save(tmp_path / "x.png", exif=exif)
    read = images.load_image(tmp_path / "x.png")
    assert (
        read.size == (10, 20)
        and read.getpixel((5, 2)) == (0, 0, 0)
        and read.getpixel((5, 17)) == (255, 255, 255)
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_rotated_uncompressed_tiffs_are_upright_and_whole(mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    image = Image.fromarray(
        np.arange(64, dtype=np.uint8).repeat(16).reshape(64, 16) * 3
    )  # a ramp, from the top
    image = (
        Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
        if mode == "I;16"
        else image.convert(mode)
    )
    image.save(tmp_path / "x.tiff", exif=exif)
    read = np.asarray(images.load_image(tmp_path / "x.tiff").convert("L")).astype(int)
    assert read.shape == (16, 64) and (np.diff(read, axis=1) > 0).all()


def test_what_is_written_has_no_colour_profile_of_its_source(tmp_path):
    from PIL import ImageCms

    image = Image.new("RGB", (9, 9))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("x.png", "x.jpg"):
        images.save_image(image, tmp_path / name)
        assert "icc_profile" not in Image.open(tmp_path / name).info


def test_an_animation_gives_its_first_frame(tmp_path):
    Image.new("RGB", (4, 4), "red").save(
        tmp_path / "x.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")]
    )
    assert images.load_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


def test_pictures_that_are_not_whole_are_errors_that_name_the_file(tmp_path):
    noise = sample().image.resize((200, 200))
    for suffix in (".jpg", ".png"):
        noise.save(tmp_path / f"x{suffix}")
        data = (tmp_path / f"x{suffix}").read_bytes()
        for content in (data[: len(data) // 2], b"", b"<html>not found</html>"):
            (tmp_path / f"x{suffix}").write_bytes(content)
            with pytest.raises(
                ValueError,
                match=rf"x\{suffix} \({len(content):,} bytes\) cannot be read whole.*again",
            ):
                images.load_image(tmp_path / f"x{suffix}")
    with pytest.raises(FileNotFoundError, match="not there"):
        images.load_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="a folder"):
        images.load_image(tmp_path)
    Image.new("F", (2, 2)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="floating point"):
        images.load_image(tmp_path / "x.tiff")


# ----------------------------------------------------------------------------------------------------------- command line


def run(*args):
    return subprocess.run(
        [sys.executable, Path(__file__).parent.parent / "synth.py", *map(str, args)], capture_output=True, text=True
    )


def test_the_contact_sheet_takes_any_data_set(tmp_path):
    wide, tall = Image.new("RGB", (3000, 500), "blue"), Image.new("RGB", (7, 900), "green")
    words = "word " * 200
    triplet_format.write_triplets(
        tmp_path,
        [
            sample("a", image=wide, crop=tall, question=words, bbox=None, answer=None),
            sample("b", question="x" * 500, answer="y" * 500),
        ],
    )
    assert previews.draw_preview(tmp_path) == tmp_path / "preview.png"
    sheet = images.load_image(tmp_path / "preview.png")
    assert (
        sheet.width < 1500 and (pixels(sheet) == (255, 255, 0)).all(-1).sum() > 4 * 50
    )  # one box is noted, and marked


def test_a_command_line_that_asks_for_nothing_or_too_little_says_so(tmp_path):
    for args in (
        [],
        ["--images", tmp_path],
        ["--images", tmp_path, "--out", tmp_path / "x", "--batch", 0],
    ):
        assert run(*args).returncode == 2
    assert "--pre" in run("--pre", tmp_path).stderr  # no abbreviations
