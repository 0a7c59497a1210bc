"""What happened to every tensor when a checkpoint was loaded."""

import dataclasses


@dataclasses.dataclass
class LoadReport:
    """What happened to every tensor; `str(report)` is human-readable.

    Attributes:
      source: what was read.
      dialect: whose naming scheme it uses: 'google', 'timm', 'hf', 'torchvision' or 'vit_jax'.
      renamed: (name in the file, our path, shape) of every parameter that comes from the file.
      resized: (our path, old shape, new shape, how).
      reset: (our path, new shape, why): parameters that were initialised anew.
      dropped: (name in the file, shape as ours or as in the file, why). Every tensor of the file
        is renamed or dropped, every parameter of the model renamed or reset.
      missing: (our path, shape) that the file does not have; not empty only inside an error.
      assumptions: what could be inferred neither from the shapes nor from a config.
      warnings: what the user might not expect.
      position_resize: the mode in which a position embedding was resized, if one was.
    """

    source: str
    dialect: str
    renamed: list[tuple[str, str, tuple]] = dataclasses.field(default_factory=list)
    resized: list[tuple[str, tuple, tuple, str]] = dataclasses.field(default_factory=list)
    reset: list[tuple[str, tuple, str]] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, tuple, str]] = dataclasses.field(default_factory=list)
    missing: list[tuple[str, tuple]] = dataclasses.field(default_factory=list)
    assumptions: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    position_resize: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.renamed)} parameters from {self.dialect} names"]
        lines += [f"  resized  {path} {_shape(old)} -> {_shape(new)} ({how})"
                  for path, old, new, how in self.resized]
        lines += [f"  reset    {path} {_shape(shape)} ({why})" for path, shape, why in self.reset]
        lines += [f"  dropped  {name} {_shape(shape)} ({why})" for name, shape, why in self.dropped]
        lines += [f"  missing  {path} {_shape(shape)}" for path, shape in self.missing]
        lines += [f"  assumed  {text}" for text in self.assumptions]
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def _shape(shape):
    return "x".join(map(str, shape)) or "scalar"
