"""A folder on a local disk or in an object store, behind a few whole-file calls.

Files appear whole or not at all: local ones are written aside and renamed, and an object store's put is atomic.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from raygrow.weights.atomic import replace_file


@dataclass(frozen=True)
class StoredFolder:
    """A folder at `uri`: a local path, or an address such as s3://bucket/runs/name."""

    uri: str
    query: str = ""
    """What follows the address and says how to reach it, such as ?region=us-east-1."""

    @property
    def local(self) -> Path | None:
        """The folder as a local path; None in an object store."""
        filesystem, path = self.resolve("")
        return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None

    def resolve(self, name: str) -> tuple[fs.FileSystem, str]:
        """The file system of a file in this folder, and the file's path there."""
        filesystem, root = fs.FileSystem.from_uri(self.uri + self.query)
        return filesystem, f"{root}/{name}".rstrip("/")

    def names(self, folder: str = "") -> list[str]:
        """Names of the files right in a folder of this one; none where there is no such folder."""
        filesystem, path = self.resolve(folder)
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def read(self, name: str) -> str | None:
        """A file's text; None where there is no such file."""
        filesystem, path = self.resolve(name)
        if filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        with filesystem.open_input_stream(path) as stream:
            return stream.read().decode()

    def write(self, name: str, text: str) -> None:
        """Writes a file as a whole."""
        filesystem, path = self.resolve(name)
        if isinstance(filesystem, fs.LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            replace_file(Path(path), text)
        else:
            with filesystem.open_output_stream(path) as stream:
                stream.write(text.encode())

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        filesystem, path = self.resolve(name)
        if filesystem.get_file_info(path).type == fs.FileType.File:
            filesystem.delete_file(path)

    def upload(self, file: Path, name: str) -> None:
        """Copies a local file into this folder."""
        filesystem, path = self.resolve(name)
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with file.open("rb") as source, filesystem.open_output_stream(path) as stream:
            shutil.copyfileobj(source, stream, length=16 * 2**20)
