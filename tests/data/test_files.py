"""Which files `data_files` names."""

from __future__ import annotations

from pathlib import Path

import pytest

from flame.data.sources.files import list_data_files, split_patterns


def test_a_file_is_listed_once_by_the_name_first_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the other name is another path, a link beside it, a glob or its folder. Copies are files of their own."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text("{}")
    (data / "copy.jsonl").write_text("{}")
    (data / "link.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(data)

    def names(data_files: str) -> list[str]:
        return [str(Path(path).relative_to(data)) for path in list_data_files(data_files, "training.data_files", (".jsonl",))]

    assert (
        names("a.jsonl,a.jsonl") == names(f"a.jsonl,../data/a.jsonl,{data}/a.jsonl") == names("a.jsonl,link.jsonl") == ["a.jsonl"]
    )
    assert names("link.jsonl,a.jsonl,copy.jsonl") == ["link.jsonl", "copy.jsonl"]
    assert names("*.jsonl,.") == names(".") == ["a.jsonl", "copy.jsonl"]


def test_links_into_a_cache_keep_their_names(tmp_path: Path) -> None:
    """As in the Hub's cache, where a snapshot's files are links to blobs without a suffix."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for index in range(2):
        (tmp_path / "blobs" / f"{index}").write_text("{}")
        (tmp_path / "snapshot" / f"{index}.jsonl").symlink_to(tmp_path / "blobs" / f"{index}")
    found = list_data_files(str(tmp_path / "snapshot"), "training.data_files", (".jsonl",))
    assert found == [str(tmp_path / "snapshot" / f"{index}.jsonl") for index in range(2)]


@pytest.mark.parametrize("data_files", ["a.jsonl,", "a.jsonl, ", " a.jsonl , ,", ",a.jsonl"])
def test_empty_parts_are_none(data_files: str) -> None:
    assert split_patterns(data_files) == ["a.jsonl"]
