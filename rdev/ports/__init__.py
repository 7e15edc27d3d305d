"""What the services need from outside, as Protocols: units, ordering, atomicity and errors."""
