"""What file names tell: the conventions of published data sets and of trees of crops."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from mprd.data.layouts import MARKET_NAME
from mprd.data.scan import Scan
from mprd.errors import UserError


class Naming(NamedTuple):
    """A convention of file names."""

    pattern: str
    """Regular expression with the groups `pid` and `camid`, both optional."""
    dataset: str = ""
    """The published data set that has it."""


NO_IDS = "."
CAMERA_FOLDER = r"^(?i:c|cam|camera)[-_ ]?(?P<camid>\d+)/"
IDENTITY_FOLDER = r"^(?P<pid>[^/]+)/"
"""The beginning of the conventions by which the first folder is a person."""
MARKET = r"(?P<pid>-?\d+)_c(?P<camid>\d+)"
NAMINGS = (
    # the number is the person in both views, what follows is the angle
    Naming(r"(?i:cam)_(?P<camid>[abAB])/(?P<pid>\d+)_(?:0|45|90|135|180)\.", "VIPeR"),
    # persons 1 to 200 are in both views; beyond, the same number is another person in the other view
    Naming(
        r"(?=(?i:cam)_(?P<camid>[abAB])/)(?:[^/]+/(?=person_0(?:[01]\d\d|200)(?!\d)))?(?P<pid>(?:[^/]+/)?person_\d+)",
        "PRID 2011",
    ),
    # pair of cameras, person of that pair, view, number
    Naming(r"(?:^|/)(?P<pid>\d_\d{3})_(?P<camid>[12])_\d{2}\.", "CUHK03"),
    # what follows the person is the clothing
    Naming(r"(?:^|/)(?P<pid>\d{3})_\d{1,2}_c(?P<camid>\d+)_\d+", "LTCC"),
    Naming(MARKET),
    Naming(r"(?P<pid>\d+)_\d{3}_(?P<camid>\d{2})_"),
    Naming(r"(?:^|/)(?P<pid>\d{8})_(?P<camid>\d{2})_\d{4}\."),
    Naming(IDENTITY_FOLDER + r"c(?P<camid>\d+)[^/]*$"),
    Naming(CAMERA_FOLDER),
    Naming(r"^(?i:cam|camera)[-_ ]?(?P<camid>[a-zA-Z])/"),
    Naming(IDENTITY_FOLDER + "[^/]+$"),
    Naming(NO_IDS),
)
"""The first that matches all names is used."""
NO_IDENTITY = re.compile(
    r"(?i)(?:c|cam|camera|view|site|scene|loc|location|place|seq|sequence|video|clip|tracks?|day|week|date|frames?|images?|"
    r"img|imgs|crops?|photos?|data|jpe?gs?|pngs?|rgb|ir|raw|part|batch|images?_?labell?ed|images?_?detected|labell?ed|"
    r"detected|single_shot|multi_shot)[-_ ]?(?:\d+|[a-z])?|(?:19|20)\d\d[-_]?[01]\d(?:[-_]?[0-3]\d)?.*"
)
"""Names of folders that are places, dates or containers rather than persons."""
VERSIONS = (("labeled", "detected"), ("labelled", "detected"), ("single_shot", "multi_shot"))
"""Words of folders that hold the same persons twice."""
DUKE_NAME = re.compile(r"^\d+_c\d+_f\d+")
MARKET_FRAME = re.compile(r"^-?\d+_c\d+s\d+_")
MSMT17_NAME = re.compile(r"^(?:.*/)?\d{4,}_\d{3}_\d{2}_")


def choose_naming(names: Sequence[str]) -> Naming:
    """Return the first convention that matches all names, each relative to the folder of its split."""
    fits = {naming: sum(re.search(naming.pattern, name) is not None for name in names) for naming in NAMINGS}
    naming = next(naming for naming, count in fits.items() if count == len(names) and is_plausible(naming, names))
    market = Naming(MARKET)
    # most names follow the convention, so the others are probably mistakes
    return market if naming.pattern == NO_IDS and fits[market] > len(names) / 2 else naming


def is_plausible(naming: Naming, names: Sequence[str]) -> bool:
    """Return whether folders may be persons, where a convention takes them for that."""
    if not naming.pattern.startswith(IDENTITY_FOLDER):
        return True
    return not any(NO_IDENTITY.fullmatch(folder) for folder in {name.split("/")[0] for name in names})


def check_versions(tree: Scan) -> None:
    """Raise UserError where an unsplit tree holds the same persons twice, in two versions."""
    tops = sorted({name.split("/")[0] for name in tree.names if "/" in name})
    for pair in VERSIONS:
        found = [next((top for top in tops if word in top.lower()), None) for word in pair]
        if all(found):
            raise UserError(f"{tree.root}: two versions of the same images ({', '.join(map(str, found))}); give one")


def published_name(names: Sequence[str], place: str) -> tuple[str, str]:
    """Return name and preset of the data set in Market-1501's folders that has these names."""
    cameras = [int(match["camid"]) for name in names if (match := MARKET_NAME.search(name))]
    if names and all(DUKE_NAME.match(name) for name in names):
        return "DukeMTMC-reID", "dukemtmcreid"
    if "msmt17" in place.lower() or max(cameras, default=0) > 8:
        return "MSMT17, Market layout", "msmt17"
    return "Market-1501" if all(MARKET_FRAME.match(n) for n in names) else "Market layout", "market1501"


def describe_pattern(pattern: str) -> str:
    """Return the ids that names hold under a pattern, in words."""
    words = {"(?P<pid>": "identities", "(?P<camid>": "cameras"}
    known = [word for group, word in words.items() if group in pattern]
    if not known:
        return "names hold neither identities nor cameras: trained without labels, not evaluated"
    return f"{' and '.join(known)} by data.name_pattern={pattern}"
