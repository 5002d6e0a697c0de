"""The url of a gallery in PostgreSQL: a connection string, the gallery's name, and a form without secrets to show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urlencode

import psycopg
from psycopg.conninfo import conninfo_to_dict

__all__ = ["Place", "read_url"]

_FORM = "postgresql://USER@HOST:PORT/DATABASE#NAME"
_ENCODE = "write % : / ? # @ in a user or password as %25 %3A %2F %3F %23 %40"
_RESERVED = ("information_schema", "public")


@dataclass(frozen=True)
class Place:
    """Location of a gallery.

    Attributes:
        conninfo: the connection string of the database, for libpq; it may hold a password.
        name: the name of the gallery and of its schema.
        shown: the url without secrets.
    """

    conninfo: str
    name: str
    shown: str


def read_url(url: str) -> Place:
    """The place that a url `postgresql://USER@HOST:PORT/DATABASE#NAME` gives.

    Errors do not quote the url: a password that is not encoded may stand in any part of it.

    Raises:
        ValueError: the url has another form, or the name is not allowed.
    """
    conninfo, _, name = url.rpartition("#")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", name) or name in _RESERVED or name.startswith("pg_"):
        raise ValueError(
            f"url must be {_FORM}, where NAME is the gallery's: at most 63 letters, digits and _, no digit first, "
            f"and not public, information_schema or pg_...; {_ENCODE}"
        )
    try:
        parts = {key: str(value) for key, value in conninfo_to_dict(conninfo).items()}
    except psycopg.ProgrammingError:  # its message quotes the url
        raise ValueError(f"url must be {_FORM}, and libpq cannot read this one; {_ENCODE}") from None
    if any("@" in parts.get(key, "") for key in ("host", "dbname")) or not re.fullmatch(
        r"[0-9,]*", parts.get("port", "")
    ):
        raise ValueError(f"url must be {_FORM}, and this one has an @ in HOST or DATABASE, or text as PORT; {_ENCODE}")
    return Place(conninfo, name, f"{_shown(parts)}#{name}")


def _shown(parts: dict[str, str]) -> str:
    """A url of the same database without secrets; it opens where PGPASSWORD or ~/.pgpass has the password."""
    rest = {key: value for key, value in parts.items() if "password" not in key and "secret" not in key}
    user, database = (quote(rest.pop(key, ""), safe="") for key in ("user", "dbname"))
    place = ""
    if "," not in rest.get("host", "") and "/" not in rest.get("host", ""):
        host, port = rest.pop("host", ""), rest.pop("port", "")
        place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    options = f"?{urlencode(rest, safe='/,')}" if rest else ""
    return f"postgresql://{user}{'@' if user else ''}{place}/{database}{options}"
