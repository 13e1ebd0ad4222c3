"""One-time links that sign a browser in, so that nobody types the password of the local servers.

The password is generated at each start and kept in a file that only its owner can read. It signs
links and sessions: anyone who can read that file can create links, and all of them expire with the
servers.
"""

import secrets

from itsdangerous import BadSignature, URLSafeTimedSerializer

PATH = "/sign-in"
SIGNED_IN = "signed_in"  # key in the session of a browser
LINK_SECONDS = 12 * 3600


def link(address: str, account: str) -> str:
    """A link that signs in the first browser that opens it.

    Args:
        address: address of the server, without a path.
        account: `user:password` of the server.
    """
    return f"{address}{PATH}?token={_signer(account).dumps(secrets.token_hex(8))}"


class Links:
    """Accepts each link once; a server has one instance for as long as it runs."""

    def __init__(self, account: str) -> None:
        self._signer = _signer(account)
        self._used: set[str] = set()

    def accept(self, token: str) -> bool:
        """Whether a token is signed with the password, not too old, and used for the first time."""
        try:
            nonce = str(self._signer.loads(token, max_age=LINK_SECONDS))
        except BadSignature:
            return False
        if nonce in self._used:
            return False
        self._used.add(nonce)
        return True


def _signer(account: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(account, salt="rlhf sign-in")
