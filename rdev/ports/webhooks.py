"""What the dispatcher needs from whoever sends webhooks."""

from typing import Protocol

from rdev.domain.sending import Outcome, OutgoingRequest


class WebhookSender(Protocol):
    """Sends one request at a time for each caller; any number of callers."""

    async def send(self, request: OutgoingRequest) -> Outcome:
        """POST once and tell what came of it.

        The receiver's name is resolved and every address judged before one of them is dialled;
        nothing inside is ever connected to. No redirect is followed, no proxy used, no cookie kept,
        nothing decompressed. A connection that was kept open and turns out to be dead is replaced
        once; the receiver may so see a request twice, with the same `webhook-id`.
        Errors: none of the receiver's doing; what goes wrong is in the outcome.
        Cancellation: the connection is closed; the receiver may or may not have taken the request.
        Blocks: on the network, at most for the sender's total time.
        """
        ...
