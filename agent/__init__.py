"""The per-node daemon and the `meshagent` command. Must not import `controller`: the two share only `meshapi`."""
