"""Write the table of back ends into README.md, from the back ends' own declarations.

python benchmarks/readme_table.py
"""

from pathlib import Path

from sparsekern.info import markdown_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- back ends: begin -->\n", "<!-- back ends: end -->"


def rewritten(text: str) -> str:
    """The README with the table as it should be."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + markdown_table().strip() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
