"""The sizes that are measured."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """Sizes of one training step."""

    name: str
    n_tokens: int  # B
    n_models: int  # M
    d_model: int  # D
    dict_size: int  # F
    k: int

    @property
    def width(self) -> int:
        """C = M·D, the width of all models side by side."""
        return self.n_models * self.d_model

    @property
    def n_pairs(self) -> int:
        """B·k, the active (token, latent) pairs of a step."""
        return self.n_tokens * self.k

    @property
    def n_weights(self) -> int:
        """P = 2·F·C, encoder and decoder weights."""
        return 2 * self.dict_size * self.width

    def __str__(self) -> str:
        return (
            f"{self.name}: B {self.n_tokens:,}, M {self.n_models}, D {self.d_model:,}, F {self.dict_size:,}, k {self.k}"
        )

    def with_sizes(self, **sizes: int | None) -> "Shape":
        """The same with some sizes replaced; None leaves one as it is."""
        given = {name: size for name, size in sizes.items() if size is not None}
        return replace(self, name="custom", **given) if given else self


SHAPES = {
    # gemma-2-9b and gemma-2-2b, 16 latents for each of their dimensions; a size for CPUs; one for dry runs
    "A": Shape("A", 8192, 2, 3584, 114_688, 100),
    "B": Shape("B", 4096, 2, 2304, 73_728, 100),
    "C": Shape("C", 2048, 2, 256, 4096, 32),
    "tiny": Shape("tiny", 256, 2, 24, 512, 8),
}
