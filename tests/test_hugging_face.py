"""Preference pairs in a Parquet file, or in a folder that datasets' save_to_disk has written."""
import os
import sys

import pytest

import data
from data import DataError, Pair, load_preferences
from support import preferences

ROW = {"prompt": "naïve \u2028?", "chosen": "c", "rejected": "r"}
DIALOGUE = {"chosen": "\n\nHuman: Hi\n\nAssistant: yes",
            "rejected": "\n\nHuman: Hi\n\nAssistant: no"}
MESSAGES = {"prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}]}
HI = Pair("\n\nHuman: Hi\n\nAssistant:", " yes", " no")


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def in_parquet(datasets, rows, path):
    datasets.Dataset.from_list(rows).to_parquet(str(path / "a.parquet"))
    return path / "a.parquet"


def in_a_folder(datasets, rows, path):
    datasets.Dataset.from_list(rows).save_to_disk(str(path / "a"))
    return path / "a"


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("save", [in_parquet, in_a_folder])
@pytest.mark.parametrize("row, pair", [
    (ROW, Pair(**ROW)), (ROW | {"score": 0.5, "id": 3}, Pair(**ROW)), (DIALOGUE, HI),
    (MESSAGES, HI),
])
def test_every_form_is_read_and_nothing_is_left_behind(
        datasets, tmp_path, monkeypatch, save, row, pair):
    """No file is changed, and none is added, there or in the library's cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    path = save(datasets, [row] * 250, tmp_path)
    before, bars, progress = contents(tmp_path), [], preferences.progress

    def bar(*args):
        assert args == (250, "row")
        bars.append(progress(*args))
        return bars[-1]
    monkeypatch.setattr(preferences, "progress", bar)
    pairs = load_preferences(path)
    assert pairs == [pair] * 250 and [bar.n for bar in bars] == [250]
    assert pairs[0].where == f"{path}, row 1" and pairs[-1].where == f"{path}, row 250"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("save", [in_parquet, in_a_folder])
def test_bad_rows_are_listed_by_their_numbers(datasets, tmp_path, save):
    rows = [ROW, ROW | {"chosen": None}, ROW | {"rejected": " "}, ROW]
    path = save(datasets, rows, tmp_path)
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert str(error.value).split("\n")[:3] == [
        f"{path}: 2 of 4 rows cannot be used.",
        "  1: chosen is neither a text, nor are all three lists of messages (None), row 2",
        "  1: rejected is empty (' '), row 3"]


def test_several_splits_are_refused_with_their_names(datasets, tmp_path):
    one = datasets.Dataset.from_list([ROW])
    path = tmp_path / "a"
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(path))
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert str(path / "train") in str(error.value) and str(path / "test") in str(error.value)
    assert load_preferences(path / "train") == [Pair(**ROW)]


@pytest.mark.parametrize("name", ["a folder", "a.parquet"])
def test_what_the_library_cannot_read_is_a_data_error(datasets, tmp_path, name):
    path = tmp_path / name
    if name == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"PAR1 is not all of it")
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        load_preferences(path)
    # cut off, or damaged in the middle
    save = in_a_folder if name == "a folder" else in_parquet
    whole = save(datasets, [ROW] * 50, tmp_path)
    file = whole if whole.is_file() else next(whole.glob("*.arrow"))
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        load_preferences(whole)


@pytest.mark.parametrize("name", ["a folder", "a.parquet"])
def test_without_the_library_the_message_says_how_to_get_it(tmp_path, monkeypatch, name):
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / name
    path.mkdir() if name == "a folder" else path.write_bytes(b"")
    with pytest.raises(DataError, match=f"{name}: .* pip install datasets"):
        load_preferences(path)


def test_an_absent_parquet_file_is_named(datasets, tmp_path):
    with pytest.raises(DataError, match="absent.parquet: cannot be read"):
        data.load_preferences(os.path.join(tmp_path, "absent.parquet"))
