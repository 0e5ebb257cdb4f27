"""Planning runs without their devices: topologies, reports of the compiler, and a search for the fastest step."""
