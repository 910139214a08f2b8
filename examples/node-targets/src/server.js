// The service itself.
const greet = require("greeter");
console.log(greet(process.env.NODE_ENV || "development"));
