"""The page that shows all figures of one model: an HTML file beside them, without scripts."""

import dataclasses
from html import escape

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 2.5rem 0; break-inside: avoid; }
img { max-width: 100%; }
table { border-collapse: collapse; }
td { padding: 0.1rem 1rem 0.1rem 0; vertical-align: top; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A kind of figure on the page.

    Attributes:
      title: heading.
      caption: what it shows and how it was computed, in plain text.
      images: file names of the figures, beside the page.
      arrays: file name of the npz with the numbers.
    """

    title: str
    caption: str
    images: tuple[str, ...]
    arrays: str


def render(
    title: str, facts: dict[str, str], sections: list[Section], left_out: dict[str, str]
) -> str:
    """The page's HTML.

    Args:
      title: of the page.
      facts: what to know about the model and the images.
      sections: in order.
      left_out: figures that do not apply, and why.
    """
    parts = [
        "<!DOCTYPE html>", '<html lang="en">', '<meta charset="utf-8">',
        f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", f"<h1>{escape(title)}</h1>",
        "<table>"]
    parts += [f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>"
              for key, value in facts.items()]
    parts.append("</table>")
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.caption)}</p>"]
        parts += [f'<figure><img src="{escape(name)}" alt="{escape(section.title)}"></figure>'
                  for name in section.images]
        parts.append(f'<p><a href="{escape(section.arrays)}">{escape(section.arrays)}</a></p>')
    if left_out:
        parts += ["<h2>Left out</h2>", "<ul>"]
        parts += [f"<li>{escape(name)}: {escape(why)}</li>" for name, why in left_out.items()]
        parts.append("</ul>")
    return "\n".join(parts) + "\n"
