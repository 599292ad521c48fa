"""The specs that come with Elbowroom: `elbowroom spec init NAME` copies one."""
