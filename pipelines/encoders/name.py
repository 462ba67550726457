"""An encoder's name: `family:reference?option=value&…`, as in `blip2:DIR?pool=mean_norm`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from pipelines.errors import ConfigError


@dataclass(frozen=True)
class EncoderName:
    """text: the whole, as the user gave it."""

    text: str
    family: str
    reference: str
    options: dict[str, str] = field(default_factory=dict, hash=False)

    @staticmethod
    def parse(text: str) -> EncoderName:
        """Raises: ConfigError for options that are no KEY=VALUE, or given twice."""
        address, question, query = text.partition("?")
        family, _, reference = address.partition(":")
        options: dict[str, str] = {}
        for part in query.split("&") if question else ():
            key, equals, value = part.partition("=")
            if not (key and equals and value) or key in options:
                raise ConfigError(f"encoder = {text}: ?{part or query} is no option.", "As in ?pool=mean&layer=-1.")
            options[key] = value
        return EncoderName(text, family, reference, options)

    def one_of(self, option: str, allowed: Collection[str], default: str) -> str:
        """The value of an option. Raises: ConfigError naming those that are allowed."""
        value = self.options.get(option, default)
        if value not in allowed:
            raise ConfigError(f"encoder = {self.text}: {option}={value} is not known.", f"Known: {', '.join(allowed)}.")
        return value

    def integer(self, option: str, default: int | None = None) -> int | None:
        value = self.options.get(option)
        if value is None:
            return default
        try:
            return int(value)
        except ValueError:
            raise ConfigError(f"encoder = {self.text}: {option}={value} is no whole number.") from None

    def refuse_options(self, known: Collection[str]) -> None:
        """Raises: ConfigError for an option that the family does not have."""
        if unknown := [option for option in self.options if option not in known]:
            listed = f"It has {', '.join(sorted(known))}." if known else "It has none."
            raise ConfigError(f"encoder = {self.text}: {self.family}: has no option {unknown[0]}.", listed)
