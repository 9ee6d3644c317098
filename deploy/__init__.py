"""What is deployed beside the programs; only its generators are Python."""
