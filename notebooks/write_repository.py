"""Writes the repository that pyproject.toml names into README's badges and into the notebooks' badges and first cells.

After another account was put there: `python notebooks/write_repository.py`.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# As a badge names a repository, and as the first cells do.
PLACES = r'(https://colab\.research\.google\.com/github/|REPOSITORY = \\"https://github\.com/)[\w.-]+/[\w.-]+'

url = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
slug = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", url)
if slug is None:
    raise SystemExit(f"pyproject.toml: project.urls.Repository is {url!r}, not https://github.com/ACCOUNT/NAME")
for path in (ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))):
    text = path.read_text()
    written, count = re.subn(PLACES, lambda place: place[1] + slug[1], text)
    if written != text:
        path.write_text(written)
    print(f"{path.relative_to(ROOT)}: {count} places, {'written' if written != text else 'as they were'}")
