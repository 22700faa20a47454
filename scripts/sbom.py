"""Turns `cargo metadata` on stdin into a CycloneDX bill of materials on stdout.

Only what ends up in the program is listed: build scripts' and tests' own dependencies are not.
"""
import json
import sys
import tomllib
import uuid

metadata = json.load(sys.stdin)
packages = {package["id"]: package for package in metadata["packages"]}
nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
root = metadata["resolve"]["root"]
with open("Cargo.lock", "rb") as file:
    checksums = {(package["name"], package["version"]): package["checksum"]
                 for package in tomllib.load(file)["package"] if "checksum" in package}


def linked(node):
    """The packages a package is linked with (a dependency kind of null is a normal one)."""
    return [dependency["pkg"] for dependency in nodes[node]["deps"]
            if any(kind["kind"] is None for kind in dependency["dep_kinds"])]


def reference(node):
    package = packages[node]
    return f"pkg:cargo/{package['name']}@{package['version']}"


def component(node, kind="library"):
    package = packages[node]
    entry = {"type": kind, "bom-ref": reference(node), "name": package["name"],
             "version": package["version"], "purl": reference(node)}
    if package.get("license"):
        entry["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    checksum = checksums.get((package["name"], package["version"]))
    if checksum:
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package.get("repository"):
        entry["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return entry


found, waiting = {root}, [root]
while waiting:
    for dependency in linked(waiting.pop()):
        if dependency not in found:
            found.add(dependency)
            waiting.append(dependency)

json.dump({
    "bomFormat": "CycloneDX",
    "specVersion": "1.5",
    "serialNumber": f"urn:uuid:{uuid.uuid4()}",
    "version": 1,
    "metadata": {"component": component(root, "application")},
    "components": sorted((component(node) for node in found if node != root),
                         key=lambda entry: entry["bom-ref"]),
    "dependencies": sorted(({"ref": reference(node),
                             "dependsOn": sorted(reference(other) for other in linked(node))}
                            for node in found), key=lambda entry: entry["ref"]),
}, sys.stdout, indent=1)
print()
