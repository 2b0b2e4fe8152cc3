"""What stands aside while it is written is never heard of."""

import pytest

from raygrow.weights.atomic import new_folder, replace_file


def test_a_file_is_replaced_as_a_whole(tmp_path):
    replace_file(tmp_path / "a.txt", "old")
    replace_file(tmp_path / "a.txt", b"new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_errors_name_what_was_to_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as folder, new_folder(tmp_path / "file/model"):
        pass
    with pytest.raises(FileNotFoundError) as inside, new_folder(tmp_path / "model") as aside:
        (aside / "missing/part").touch()
    with pytest.raises(FileNotFoundError) as file:
        replace_file(tmp_path / "nowhere/report.html", "text")
    named = [caught.value.filename for caught in (folder, inside, file)]
    assert named == [str(tmp_path / name) for name in ("file/model", "model/missing/part", "nowhere/report.html")]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_others_made_meanwhile_is_not_replaced(tmp_path):
    theirs = tmp_path / "model/theirs"
    with pytest.raises(FileExistsError, match="model exists already"), new_folder(tmp_path / "model"):
        theirs.mkdir(parents=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "theirs"]


def test_a_path_without_a_name_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    with new_folder(tmp_path / "here/../there") as aside:
        (aside / "a").touch()
    assert (tmp_path / "there/a").exists()


def test_a_folder_that_came_to_nothing_takes_its_new_parents_along(tmp_path):
    with pytest.raises(ValueError, match="bad"), new_folder(tmp_path / "new/newer/model"):
        raise ValueError("bad")
    assert not list(tmp_path.iterdir())
