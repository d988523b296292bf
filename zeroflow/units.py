"""Quantities as text for people: parameters, memory, files, durations, speeds."""


def parameter_count(parameters: int) -> str:
    """Return a number of parameters as text, such as 317.6M or 34,976."""
    return f"{parameters / 1e6:,.1f}M" if parameters >= 1e6 else f"{parameters:,}"


def binary(size: int) -> str:
    """Return an amount of memory as text, such as 37.44 GiB or 512 MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def decimal(size: int) -> str:
    """Return a file size as text, such as 16.14 GB, 552 MB or 0.6 MB."""
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB"


def duration(seconds: float) -> str:
    """Return a duration as text, such as 42 s, 3 min 5 s, 2 h 10 min or 4 d 3 h."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    parts: list[str] = []
    for unit, size in units:
        whole, left = divmod(left, size)
        if whole or (unit == "s" and not parts):
            parts.append(f"{whole} {unit}")
    return " ".join(parts[:2])


def speed(tokens_per_second: float | None) -> str:
    return "unknown" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s"


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with a noun, such as 1 row or 1,024 rows; the default plural adds an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def change(share: float) -> str:
    """Return a relative change as text, such as +3.2%; from three times on, as 88 times."""
    times = 1 + share
    if times < 3:
        return f"{share:+.1%}"
    return f"{times:.1f} times" if times < 10 else f"{times:,.0f} times"


def vocabulary(tokens: int, padded: int) -> str:
    """Return the number of tokens of a tokenizer, and of a model's padded vocabulary, as text."""
    return f"{tokens:,}" if tokens == padded else f"{tokens:,} padded to {padded:,}"
