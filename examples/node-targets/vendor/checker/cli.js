#!/usr/bin/env node
require(require("path").resolve(process.argv[2]));
console.log("checked");
