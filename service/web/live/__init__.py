"""Live drawing: a WebSocket on which frames come in and pictures go out.

Owns the protocol ``fourstep.v1``, its sessions and what they may have; draws by the same admission
and the same jobs as every request.
"""
