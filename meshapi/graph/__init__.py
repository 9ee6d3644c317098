"""Who talks to whom: what one node says of it, what several say together, and drawings of that. Pure; shared by agent, command line and controller."""
