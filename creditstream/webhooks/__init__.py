"""Limit alerts leave the house: from ``limit-alerts`` to the endpoints of a file, signed, retried, known by their id.

The road of an alert (`notifier`): read from ``limit-alerts`` → a waiting delivery per endpoint that wants it stands in
the outbox (`outbox`, a compacted topic) → the offset is committed → attempts by `schedule`, each a signed request
(`signing`, `sending`) → its outcome stands in the outbox. A crash between any two of these repeats no more than what
was in flight, under the same ``webhook-id``; no alert is lost, none gets a second id.

Partition n of the outbox belongs to whoever the consumer group gave ``limit-alerts[n]``; it is loaded before anything
of it is sent. Nothing fences a topic: a notifier that was paused for longer than its session may send, or record, one
more attempt of what it had in flight. The receiver tells it by the id.

Deliveries have no order: a retry comes after what is newer, and the body's ``timestamp`` tells which is which.
"""
