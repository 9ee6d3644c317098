"""What was called lately on this node, and what other policies would say of it: `meshagent policy try`."""
