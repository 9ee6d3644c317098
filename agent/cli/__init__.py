"""The `meshagent` command line: a thin layer over the agent's and the controller's APIs."""
