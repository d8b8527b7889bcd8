"""Access tokens and other secrets in text: found by their shape, and blanked out."""

from __future__ import annotations

import re

_BLANK = "***"
_HUB = re.compile(r"(?<![A-Za-z0-9])(?:hf_(?:oauth_|jwt_)?|api_org_)[A-Za-z0-9]{16,}[\w.-]*")
_OTHERS = re.compile(
    r"\b(?:gh[pousr]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{18,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|xox[abprs]-[\w-]{10,}|sk-(?:proj|ant|or|svcacct)-[\w-]{16,}|sk-[A-Za-z0-9]{32,}|npm_\w{30,}|pypi-[\w-]{50,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}|ASIA[0-9A-Z]{16}|[sr]k_live_\w{16,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|ya29\.[\w-]{16,}|gsk_\w{20,}|r8_\w{20,}|dapi[0-9a-f]{32}|dop_v1_[0-9a-f]{32,}|nvapi-[\w-]{20,}|xai-\w{20,}"
    r"|pplx-\w{20,}|shpat_[0-9a-f]{32}|lin_api_\w{20,}|dckr_pat_[\w-]{20,}|hvs\.[\w-]{20,}|AGE-SECRET-KEY-1\w{20,}"
    r"|GR1348941[\w-]{16,})"
    r"|https://(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/[\w/-]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
)
# ``api_key: …``, ``--token=…``, ``HF_TOKEN=…``; not ``pad_token`` or ``num_tokens``, which are a model's
_NAMED = re.compile(
    r"(?i)(\b[\w-]*(?:api[_-]?key|secret|passw(?:or)?d|credential|private[_-]?key|access[_-]?key|(?:hf|hub|access|auth"
    r"|api|bearer)[_-]token)[\w-]*[\"']?(?:\s*[:=]\s*|\s+)|(?<![\w-])(?:--)?token(?:\s*=\s*|\s*:\s*|\s+(?=hf_)))"
    r"([\"']?)(?!\*\*\*|hf_\*\*\*|null\b|none\b|true\b|false\b)[^\s\"',;}\]]{6,}"
)


def without_tokens(text: str, *secrets: str | None) -> str:
    """Blank out access tokens; a command line or a setting may carry one, and what is published stays public.

    Args:
        text: What is to be shown.
        secrets: Tokens in use, which need not look like anybody's.
    """
    for secret in secrets:
        text = text.replace(secret, f"hf_{_BLANK}") if secret else text
    return _OTHERS.sub(_BLANK, _HUB.sub(f"hf_{_BLANK}", text))


def without_secrets(text: str) -> str:
    """Blank out tokens, and also whatever stands behind a name such as ``api_key``: for text that tells a run."""
    return _NAMED.sub(rf"\1\2{_BLANK}", without_tokens(text))
