"""All that agent and controller share: .proto files, the code generated from them, and what both need. Imports neither."""
