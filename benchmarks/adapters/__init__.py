"""Systems that the conformance suite is run on."""
